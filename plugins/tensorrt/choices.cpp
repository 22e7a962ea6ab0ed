#include "choices.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <string_view>

namespace esparse {
namespace {

constexpr int kNameBits = 26;  // and 5 for the bucket: 31, as a tactic is positive
static_assert(std::size(kBuckets) < 32);

// FNV-1a, folded to the bits that a tactic has for it; never 0.
int32_t digest(const std::string_view name) {
  uint32_t hash = 2166136261u;
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 16777619u;
  hash = (hash >> kNameBits ^ hash) & ((1u << kNameBits) - 1);
  return static_cast<int32_t>(std::max(hash, 1u));
}

bool runs(const esparse_gemm& problem, const esparse_gpu& gpu, int32_t candidate) {
  return candidate != kHeuristic && esparse_supports(&problem, &gpu, candidate, nullptr) == ESPARSE_SUCCESS;
}

}  // namespace

int bucket_of(int64_t m) {
  const auto* bucket = std::lower_bound(std::begin(kBuckets), std::end(kBuckets), std::min(m, kLastBucket));
  return static_cast<int>(bucket - std::begin(kBuckets));
}

std::string parse_choices(const std::string& text, Choices& choices) {
  choices = {};
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view row = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(row.size() + 1, rest.size()));
    const size_t equals = row.find('=');
    if (equals == std::string_view::npos || equals + 1 == row.size())
      return "'" + std::string(row) + "' is not bound=name";
    int64_t bound = 0;
    const auto [end, error] = std::from_chars(row.data(), row.data() + equals, bound);
    if (error != std::errc() || end != row.data() + equals || bound < 1)
      return "'" + std::string(row) + "' does not start with a number of tokens";
    if (!choices.rows.empty() && bound <= choices.rows.back().bound)
      return "'" + std::string(row) + "' is not in ascending order";
    const std::string name(row.substr(equals + 1));
    const int32_t candidate = esparse_find_candidate(name.c_str());
    if (candidate < 0) choices.unknown.push_back(name);
    choices.rows.push_back({bound, candidate < 0 ? kHeuristic : candidate});
  }
  return "";
}

int32_t tactic_of(int32_t candidate, int bucket) {
  return bucket << kNameBits | digest(esparse_candidate_name(candidate));
}

Tactic find_tactic(int32_t number) {
  if (number <= 0) return {};
  Tactic tactic;
  tactic.bucket = number >> kNameBits;
  for (int32_t i = 0; i < esparse_candidate_count() && tactic.candidate == kHeuristic; ++i)
    if (digest(esparse_candidate_name(i)) == (number & ((1 << kNameBits) - 1))) tactic.candidate = i;
  return tactic;
}

int32_t select(const esparse_gemm& problem, const esparse_gpu& gpu, const Choices& choices, const Tactic& tactic,
               bool foreign) {
  const int32_t reference = esparse_find_candidate("reference");
  const auto usable = [&](int32_t candidate) {
    return runs(problem, gpu, candidate) &&
           (!foreign || esparse_workspace_bytes(&problem, candidate) <= esparse_workspace_bytes(&problem, reference));
  };
  const auto row = std::find_if(choices.rows.begin(), choices.rows.end(),
                                [&](const Choice& choice) { return std::min(problem.m, kLastBucket) <= choice.bound; });
  if (row != choices.rows.end() && usable(row->candidate)) return row->candidate;
  if (choices.rows.empty() && tactic.bucket == bucket_of(problem.m) && usable(tactic.candidate))
    return tactic.candidate;
  const int32_t heuristic = esparse_default_candidate(&problem, &gpu);
  return usable(heuristic) ? heuristic : usable(reference) ? reference : kHeuristic;
}

size_t workspace_bound(esparse_gemm problem) {
  // An engine can be built on a machine without a GPU, or move to another one, where the heuristic may choose
  // differently; the candidates' own demands depend on the problem only.
  constexpr esparse_gpu kGpus[] = {{80, 108}, {86, 84}, {89, 142}, {90, 132}};
  const int64_t largest = problem.m;
  std::vector<int64_t> sizes(std::begin(kBuckets), kBuckets + bucket_of(largest));
  sizes.push_back(largest);
  size_t bound = 0;
  for (const int64_t size : sizes) {
    problem.m = size;
    for (int32_t candidate = 0; candidate < esparse_candidate_count(); ++candidate)
      if (std::any_of(std::begin(kGpus), std::end(kGpus), [&](auto& gpu) { return runs(problem, gpu, candidate); }))
        bound = std::max(bound, esparse_workspace_bytes(&problem, candidate));
  }
  return bound;
}

}  // namespace esparse
