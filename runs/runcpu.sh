#!/usr/bin/env bash
# A larger model, a d6, about half an hour on a laptop: the steps of speedrun_small.sh with configs/cpu-d6.flags.
#   bash runs/runcpu.sh
# Variables and arguments as for speedrun_small.sh.
PROFILE="${PROFILE:-cpu-d6}"
source "$(dirname "${BASH_SOURCE[0]}")/speedrun_small.sh"
