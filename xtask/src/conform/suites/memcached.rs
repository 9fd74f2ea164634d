//! memcached's own tests, from Debian's source package.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts};

const PATIENCE: Duration = Duration::from_secs(300);

const BUILD: &str = "./configure >configure.out 2>&1 && \
                     make memcached-debug sizes timedrun testapp >make.out 2>&1";

/// Files of tests, first those that start servers with much data; without those for TLS, which is not
/// built.
const FILES: [&str; 76] = [
    "slabs-reassign2",
    "slabs-reassign-chunked",
    "slabs_reassign",
    "chunked-items",
    "evictions",
    "item_size_max",
    "dyn-maxbytes",
    "lru-crawler",
    "lru-maintainer",
    "lru",
    "dash-M",
    "64bit",
    "issue_14",
    "issue_61",
    "issue_68",
    "issue_70",
    "issue_104",
    "issue_140",
    "binary",
    "cas",
    "getset",
    "incrdecr",
    "metaget",
    "stats",
    "00-startup",
    "ascii-auth",
    "binary-extstore",
    "binary-get",
    "binary-sasl",
    "bogus-commands",
    "chunked-extstore",
    "conn-limits",
    "daemonize",
    "error-extstore",
    "expirations",
    "extstore-buckets",
    "extstore-jbod",
    "extstore",
    "flags",
    "flush-all",
    "getandtouch",
    "idle-timeout",
    "issue_108",
    "issue_152",
    "issue_163",
    "issue_183",
    "issue_192",
    "issue_22",
    "issue_260",
    "issue_29",
    "issue_3",
    "issue_41",
    "issue_42",
    "issue_50",
    "issue_67",
    "line-lengths",
    "malicious-commands",
    "maxconns",
    "misbehave",
    "multiversioning",
    "noreply",
    "proxy",
    "quit",
    "refhang",
    "restart",
    "shutdown",
    "slabhang",
    "stats-conns",
    "stats-detail",
    "strtol-testing",
    "touch",
    "udp",
    "unixsocket",
    "watcher",
    "watcher_connid",
    "whitespace",
];

pub(super) fn prepare(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["perl", "libevent-dev", "autotools-dev", "automake", "autoconf"])?;
    let tree = cache.source("memcached", BUILD)?;
    let from = tree.display().to_string();
    let cases = FILES.map(|file| {
        let test = format!("t/{file}.t");
        let mut case = Case::new(format!("memcached: {file}"), ["perl", &test], PATIENCE, read);
        let links =
            "cp -a \"$0\"/t . && ln -s \"$0\"/memcached-debug \"$0\"/sizes \"$0\"/timedrun .";
        case.furnish = Some(["sh", "-ec", links, &from].map(str::to_owned).to_vec());
        case
    });
    let name = tree.file_name().unwrap_or_default().display();
    Ok((format!("tests of Debian's source {name}"), cases.into()))
}

/// `ok 12 - name`, `not ok 12 - name`.
fn read(ended: &Ended) -> anyhow::Result<Verdicts> {
    let text = fs::read(&ended.outcome.output).context("read the output")?;
    let mut verdicts = Verdicts::new();
    for line in String::from_utf8_lossy(&text).lines() {
        let (verdict, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => ("ok", rest),
            (_, Some(rest)) => ("FAIL", rest),
            (None, None) => continue,
        };
        verdicts.insert(rest.to_owned(), verdict.to_owned());
    }
    Ok(verdicts)
}
