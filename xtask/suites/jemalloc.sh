#!/bin/sh
# Runs programs of jemalloc's tests one after the other, as jemalloc's own script does, and prints their
# lines with the program's name before them.
#
#     jemalloc.sh PROGRAM...
set -u
for program in "$@"; do
    name=$(basename "$program")
    settings=''
    # The program's settings are what a script beside it says.
    if [ -e "$program.sh" ]; then
        settings=$(enable_fill=1 enable_prof=0 enable_uaf_detection=0 \
            sh -c '. "$1" >/dev/null 2>&1; echo "${MALLOC_CONF:-}"' sh "$program.sh")
    fi
    MALLOC_CONF="$settings" "$program" >jemalloc.out 2>&1
    status=$?
    sed "s|^|$name: |" jemalloc.out
    echo "$name: status: $status"
done
