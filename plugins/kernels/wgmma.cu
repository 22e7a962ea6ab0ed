#include "candidate.h"

void esparse::add_wgmma(Candidates&) {}
