#include "candidate.h"

void esparse::add_ampere(Candidates&) {}
