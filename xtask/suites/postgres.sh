#!/bin/sh
# PostgreSQL's regression tests against a server of its own, as a user who is not root: the server
# refuses root. That user keeps the one capability that farmem's pagers need.
#
#     postgres.sh BINARIES REGRESS-DRIVER SOURCES SETTINGS SCHEDULE
#
# Runs in an empty folder, and prints the driver's verdicts.
set -eu
binaries=$1 driver=$2 sources=$3 settings=$4 schedule=$5
here=$(pwd)

if [ "$(id -u)" = 0 ]; then
    chown postgres "$here"
    chmod 755 "$here" "$(dirname "$here")"
    exec setpriv --reuid=postgres --regid=postgres --init-groups --no-new-privs \
        --inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace sh "$0" "$@"
fi

export HOME="$here" PGTZ=PST8PDT PGDATESTYLE='Postgres, MDY'
"$binaries/initdb" --no-locale --encoding=UTF8 --auth=trust --no-sync -D data >initdb.out
printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '$here'" 'fsync = off' \
    'max_prepared_transactions = 2' "$settings" >>data/postgresql.conf
"$binaries/pg_ctl" start -s -w -D data -l server.log
trap '"$binaries/pg_ctl" stop -s -w -m fast -D data' EXIT
"$driver" --bindir="$binaries" --host="$here" --inputdir="$sources" --dlpath="$sources" \
    --outputdir="$here" --schedule="$schedule" --max-concurrent-tests=20 || true
