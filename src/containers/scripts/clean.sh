#!/bin/sh
# Removes what an earlier run left, and makes room for the files of this one. See ../inside.rs.
#   clean.sh [keep]: with keep, an empty directory for files is there afterwards
set -e
rm -rf /var/tmp/gpu-handoff
[ "$1" != keep ] || mkdir -m 700 /var/tmp/gpu-handoff
