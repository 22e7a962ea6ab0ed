#include "candidate.h"

void esparse::add_decode(Candidates&) {}
