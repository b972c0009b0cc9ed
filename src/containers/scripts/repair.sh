#!/bin/sh
# Ends what an interrupted dpkg was at. See ../inside.rs.
set -e
export DEBIAN_FRONTEND=noninteractive
dpkg --configure -a --force-confdef --force-confold
apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 --no-install-recommends -f install
