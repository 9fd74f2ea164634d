//! Redis's own tests, unit by unit, from Debian's source package. Servers and clients are all in the
//! tree of the run.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts};

const PATIENCE: Duration = Duration::from_secs(600);

/// Its own allocator needs cmake and autotools; the C library's does for this.
const BUILD: &str = "make MALLOC=libc >make.out 2>&1";

/// All units, first those with much data, without those for TLS, which is not built, and those that
/// need gigabytes.
const UNITS: [&str; 81] = [
    "unit/memefficiency",
    "unit/maxmemory",
    "unit/lazyfree",
    "unit/type/zset",
    "unit/aofrw",
    "unit/dump",
    "unit/querybuf",
    "unit/scripting",
    "integration/dismiss-mem",
    "unit/type/list",
    "unit/sort",
    "unit/type/list-2",
    "unit/type/list-3",
    "unit/type/set",
    "unit/type/hash",
    "unit/type/string",
    "unit/type/stream",
    "unit/type/stream-cgroups",
    "unit/type/incr",
    "unit/scan",
    "unit/keyspace",
    "unit/other",
    "unit/functions",
    "unit/multi",
    "unit/bitops",
    "unit/bitfield",
    "unit/geo",
    "unit/hyperloglog",
    "unit/tracking",
    "unit/acl",
    "unit/auth",
    "unit/protocol",
    "unit/limits",
    "unit/slowlog",
    "unit/pubsub",
    "unit/info",
    "integration/rdb",
    "integration/aof",
    "integration/corrupt-dump",
    "integration/convert-zipmap-hash-on-load",
    "unit/info-command",
    "unit/expire",
    "unit/quit",
    "unit/acl-v2",
    "unit/latency-monitor",
    "integration/block-repl",
    "integration/replication",
    "integration/replication-2",
    "integration/replication-3",
    "integration/replication-4",
    "integration/replication-psync",
    "integration/replication-buffer",
    "integration/shutdown",
    "integration/aof-multi-part",
    "integration/corrupt-dump-fuzzer",
    "integration/convert-ziplist-hash-on-load",
    "integration/convert-ziplist-zset-on-load",
    "integration/logging",
    "integration/psync2",
    "integration/psync2-reg",
    "integration/psync2-pingoff",
    "integration/psync2-master-restart",
    "integration/failover",
    "integration/redis-cli",
    "integration/redis-benchmark",
    "unit/pubsubshard",
    "unit/introspection",
    "unit/introspection-2",
    "unit/obuf-limits",
    "unit/wait",
    "unit/pause",
    "unit/pendingquerybuf",
    "unit/oom-score-adj",
    "unit/shutdown",
    "unit/networking",
    "unit/cluster",
    "unit/client-eviction",
    "unit/replybufsize",
    "unit/cluster-scripting",
    "unit/cluster/misc",
    "unit/cluster/links",
];

pub(super) fn prepare(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["tcl", "pkgconf", "procps"])?;
    let tree = cache.source("redis", BUILD)?;
    let from = tree.display().to_string();
    let cases = UNITS.map(|unit| {
        let command = ["tclsh", "tests/test_helper.tcl", "--clients", "1", "--single", unit];
        let mut case = Case::new(format!("redis: {unit}"), command, PATIENCE, read);
        let copy = "cp -a \"$0\"/tests \"$0\"/redis.conf . && ln -s \"$0\"/src src";
        case.furnish = Some(["sh", "-ec", copy, &from].map(str::to_owned).to_vec());
        case
    });
    let name = tree.file_name().unwrap_or_default().display();
    Ok((format!("`runtest` of Debian's source {name}"), cases.into()))
}

/// `[ok]: name (5 ms)`, `[err]: name in file`, in colours.
fn read(ended: &Ended) -> anyhow::Result<Verdicts> {
    let text = fs::read(&ended.outcome.output).context("read the output")?;
    let mut verdicts = Verdicts::new();
    for line in String::from_utf8_lossy(&text).lines() {
        let line = without_colours(line);
        let Some((verdict, name)) = line.strip_prefix('[').and_then(|line| line.split_once("]: "))
        else {
            continue;
        };
        if ["ok", "err", "skip", "ignore", "exception", "timeout"].contains(&verdict) {
            let name = name.split(" in tests/").next().unwrap_or(name);
            let timed = name.rsplit_once(" (").filter(|(_, time)| time.ends_with("ms)"));
            let name = timed.map_or(name, |(name, _)| name);
            verdicts.insert(name.to_owned(), verdict.to_owned());
        }
    }
    Ok(verdicts)
}

fn without_colours(line: &str) -> String {
    let mut parts = line.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('m').map_or("", |(_, rest)| rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_taken_off() {
        assert_eq!(without_colours("[\u{1b}[0;32;49mok\u{1b}[0m]: a (5 ms)"), "[ok]: a (5 ms)");
    }
}
