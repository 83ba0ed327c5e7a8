#!/usr/bin/env bash
# About half an hour on a laptop: a d6, the same steps as speedrun_small.sh and the same environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/_lib.sh"
profile 6 64 L 512 8192 8 8192 750 125 131072 100000000 20 4  # the columns are named in device_profile
source runs/speedrun_small.sh
