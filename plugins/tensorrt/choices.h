// Which candidate runs at which number of tokens: the tuner's rows of one layer, and the tactic that TensorRT timed.
//
// A `choices` string is "bound=name,bound=name,...", bounds ascending: M tokens take the candidate of the first bound
// that is not below M. "1=decode_a,64=wgmma_b" is decode_a at M = 1 and wgmma_b at M = 2..64; above the last bound,
// and where the string is empty, the heuristic of the kernels decides. A bound of 8192 is for all above too.
//
// A tactic is one candidate for one bucket of M, the one that TensorRT timed it in; the heuristic decides elsewhere.
// Its number holds a digest of the candidate's name, not its index: an engine may meet another version of the library,
// and must not run another kernel there than the one that was timed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "esparse/sparse_gemm.h"

namespace esparse {

// Upper ends of the buckets of M that are timed and planned for. The last one goes on to the 65536 of the C ABI.
constexpr int64_t kBuckets[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192};
constexpr int64_t kLastBucket = 8192;

// Index of the bucket of m, 1 <= m.
int bucket_of(int64_t m);

constexpr int32_t kHeuristic = -1;  // in the place of a candidate: none was chosen

struct Choice {
  int64_t bound;      // largest M
  int32_t candidate;  // kHeuristic where this library has no candidate of that name
};

struct Choices {
  std::vector<Choice> rows;
  std::vector<std::string> unknown;  // names that this library does not have
};

// Parse a `choices` string. Returns what is wrong with it, empty if nothing is.
std::string parse_choices(const std::string& text, Choices& choices);

// Number of the tactic "`candidate` in bucket `bucket`": positive, the same in every version of the library.
int32_t tactic_of(int32_t candidate, int bucket);

struct Tactic {
  int32_t candidate = kHeuristic;
  int bucket = -1;
};

// What a number stands for; a candidate that this library does not have is kHeuristic.
Tactic find_tactic(int32_t number);

// The chosen candidate for the problem; the heuristic's where none was chosen or the chosen one cannot run it.
// kHeuristic when nothing can.
//
// `foreign`: another version of the library planned the scratch memory, for candidates of its own. The reference kernel
// is in every version, so what it needs is there, and only candidates that need no more are chosen.
int32_t select(const esparse_gemm& problem, const esparse_gpu& gpu, const Choices& choices, const Tactic& tactic,
               bool foreign);

// Scratch memory that is enough for every candidate at every number of tokens up to problem.m.
size_t workspace_bound(esparse_gemm problem);

}  // namespace esparse
