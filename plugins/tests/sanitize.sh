#!/bin/bash
# memcheck, initcheck and racecheck on tiny problems, all kernels or those whose names start with FAMILY: decode_,
# wgmma_, cutlass_, ampere_, reference.
#
#   plugins/tests/sanitize.sh build/plugins/test_candidates [FAMILY ...]
#
# memcheck and initcheck take seconds for a family. racecheck takes that long for one kernel, so it gets one of each
# structure, and it leaves out the kernels that make and compare the data. Not of wgmma's tiles of 128 tokens and more,
# which had not ended under it after four minutes. It does not see what the TMA unit copies, for which there is
# test_candidates --stress. With --launch-count it fails by itself ("failed to handle a hardware exception") and counts
# that as a hazard (compute-sanitizer of CUDA 13.0).
set -u
test=${1:?usage: $0 TEST_CANDIDATES [FAMILY ...]}
shift
[ $# -gt 0 ] || set -- decode_ wgmma_ cutlass_ ampere_ reference
races="decode_r2k4u6_s2 decode_r8k1u4_s1 decode_r16k1u2_s4 wgmma_n64m32_s2_o2 wgmma_n64m64_s2_x4 wgmma_n128m64_x2_w2
  cutlass_128x128_c12_w1m cutlass_256x128_c12_w1m cutlass_128x64_streamk_c11_w1m ampere_64x64 reference"
failed=0

check() {  # FILTER TOOL [OPTION ...]
  local filter=$1
  shift
  echo "== $1 $filter"
  compute-sanitizer --tool "$@" --error-exitcode 1 --print-limit 3 "$test" --tiny --filter "$filter" || failed=1
}

for family in "$@"; do
  check "$family" memcheck
  check "$family" initcheck
  for kernel in $races; do
    [[ $kernel == "$family"* ]] && check "$kernel" racecheck --kernel-name-exclude kns=esparse_test
  done
done
exit $failed
