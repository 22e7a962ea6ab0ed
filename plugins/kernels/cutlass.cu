#include "candidate.h"

void esparse::add_cutlass(Candidates&) {}
