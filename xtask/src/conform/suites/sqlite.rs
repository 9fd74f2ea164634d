//! SQLite's own tests, the `veryquick` ones, from Debian's source package.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts};

const PATIENCE: Duration = Duration::from_secs(900);

const BUILD: &str =
    "./configure --enable-all >configure.out 2>&1 && make testfixture >make.out 2>&1";

/// The beginnings of the names of files of tests that run in one process; it takes a minute or two.
/// attach.test is in none: it ends the run if it is root's.
const GROUPS: [(&str, &[&str]); 16] = [
    ("select and where", &["select", "where"]),
    ("joins and sorting", &["join", "sort", "orderby", "distinct"]),
    ("indexes", &["index", "unique", "skipscan", "autoindex"]),
    ("windows and common tables", &["window", "with", "agg"]),
    ("triggers and views", &["trigger", "view", "upsert", "returning"]),
    ("changes", &["insert", "update", "delete", "alter"]),
    ("b-trees and pages", &["btree", "pager", "cache", "incrvacuum"]),
    ("memory", &["mem", "softheap", "hardheap", "lookaside"]),
    ("large values", &["blob", "incrblob", "zeroblob", "substr"]),
    ("text search", &["fts1", "fts2", "fts4"]),
    ("text search 3", &["fts3"]),
    ("journals and vacuum", &["journal", "vacuum", "savepoint"]),
    ("write-ahead log", &["wal"]),
    ("expressions", &["expr", "func", "json", "date", "like"]),
    ("schemas", &["schema", "table", "type", "collate", "check"]),
    ("reported defects", &["tkt", "fuzz"]),
];

pub(super) fn prepare(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["tcl-dev", "zlib1g-dev", "libreadline-dev"])?;
    let tree = cache.source("sqlite3", BUILD)?;
    let cases = GROUPS.iter().map(|(name, starts)| {
        // Of all, only those.
        let omit = format!("QUICKTEST_OMIT=^(?!{})", starts.join("|"));
        let fixture = tree.join("testfixture").display().to_string();
        let suite = tree.join("test/veryquick.test").display().to_string();
        let command = ["env".to_owned(), omit, fixture, suite];
        Case::new(format!("sqlite: {name}"), command, PATIENCE, read)
    });
    let name = tree.file_name().unwrap_or_default().display();
    Ok((format!("`veryquick` of Debian's source {name}, {} groups", GROUPS.len()), cases.collect()))
}

/// `name... Ok`, and for each failure `! name expected` or `Error: `.
fn read(ended: &Ended) -> anyhow::Result<Verdicts> {
    let text = fs::read(&ended.outcome.output).context("read the output")?;
    let mut verdicts = Verdicts::new();
    for line in String::from_utf8_lossy(&text).lines() {
        if let Some(name) = line.strip_suffix("... Ok") {
            verdicts.entry(name.to_owned()).or_insert_with(|| "ok".to_owned());
        } else if let Some(rest) = line.strip_prefix("! ") {
            let name = rest.split_whitespace().next().unwrap_or_default();
            verdicts.insert(name.to_owned(), "FAIL".to_owned());
        } else if let Some((errors, _)) = line.split_once(" errors out of ") {
            // How many tests there are differs from run to run: some go on until no allocation is
            // left to fail.
            verdicts.insert("errors".to_owned(), errors.to_owned());
        }
    }
    Ok(verdicts)
}
