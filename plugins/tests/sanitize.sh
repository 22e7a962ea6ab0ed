#!/bin/bash
# memcheck, racecheck and initcheck on tiny problems. memcheck and initcheck take seconds a family, racecheck minutes;
# it does not see the copies of the TMA unit, for which there is test_candidates --stress.
#
#   plugins/tests/sanitize.sh build/plugins/test_candidates [FAMILY ...]
#
# A family is the start of candidates' names: decode_, wgmma_, cutlass_, ampere_, reference.
set -u
test=${1:?usage: $0 TEST_CANDIDATES [FAMILY ...]}
shift
[ $# -gt 0 ] || set -- decode_ wgmma_ cutlass_ ampere_ reference
failed=0
for tool in memcheck racecheck initcheck; do
  for family in "$@"; do
    echo "== $tool $family"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 3 "$test" --tiny --filter "$family" || failed=1
  done
done
exit $failed
