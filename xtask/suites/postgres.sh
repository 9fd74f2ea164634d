#!/bin/sh
# PostgreSQL's regression tests against a server of its own in the present folder.
#
#     postgres.sh BINARIES DRIVER SOURCES SCHEDULE
#
# Prints the driver's verdicts.
set -eu
binaries=$1 driver=$2 sources=$3 schedule=$4
here=$(pwd)
export PGTZ=PST8PDT PGDATESTYLE='Postgres, MDY'

"$binaries/initdb" --no-locale --encoding=UTF8 --auth=trust --no-sync -D data >initdb.out
printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '$here'" 'fsync = off' \
    'max_prepared_transactions = 2' >>data/postgresql.conf
"$binaries/pg_ctl" start -s -w -D data -l server.log
trap '"$binaries/pg_ctl" stop -s -w -m fast -D data' EXIT
printf '%s' "$schedule" >schedule
"$driver" --bindir="$binaries" --host="$here" --inputdir="$sources" --dlpath="$sources" \
    --outputdir="$here" --schedule=schedule --max-concurrent-tests=20 || true
