//! SQLite's own tests, the `veryquick` ones, from Debian's source package.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts};

const PATIENCE: Duration = Duration::from_secs(900);

const BUILD: &str =
    "./configure --enable-all >configure.out 2>&1 && make testfixture >make.out 2>&1";

/// Files of tests that run in one process each; the groups are of some minutes at most. attach.test
/// is in none: it ends the run if it is root's.
const GROUPS: [(&str, &[&str]); 16] = [
    ("select and where", &["select*.test", "where*.test"]),
    ("joins and sorting", &["join*.test", "sort*.test", "orderby*.test", "distinct*.test"]),
    ("indexes", &["index*.test", "unique*.test", "skipscan*.test", "autoindex*.test"]),
    ("windows and common tables", &["window*.test", "with*.test", "agg*.test"]),
    ("triggers and views", &["trigger*.test", "view*.test", "upsert*.test", "returning*.test"]),
    ("changes", &["insert*.test", "update*.test", "delete*.test", "alter*.test"]),
    ("b-trees and pages", &["btree*.test", "pager*.test", "cache*.test", "incrvacuum*.test"]),
    ("memory", &["mem*.test", "malloc*.test", "softheap*.test", "hardheap*.test"]),
    ("large values", &["blob*.test", "incrblob*.test", "big*.test", "zeroblob*.test"]),
    ("text search", &["fts1*.test", "fts2*.test", "fts4*.test"]),
    ("text search 3", &["fts3*.test"]),
    ("journals and vacuum", &["journal*.test", "vacuum*.test", "savepoint*.test"]),
    ("write-ahead log", &["wal*.test"]),
    ("expressions", &["expr*.test", "func*.test", "json*.test", "date*.test", "like*.test"]),
    ("schemas", &["schema*.test", "table*.test", "type*.test", "collate*.test", "check*.test"]),
    ("reported defects", &["tkt*.test", "fuzz*.test"]),
];

pub(super) fn prepare(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["tcl-dev", "zlib1g-dev", "libreadline-dev"])?;
    let tree = cache.source("sqlite3", BUILD)?;
    let cases = GROUPS.iter().map(|(name, patterns)| {
        let fixture = tree.join("testfixture").display().to_string();
        let suite = tree.join("test/permutations.test").display().to_string();
        let command = [fixture, suite, "veryquick".to_owned()];
        let patterns = patterns.iter().map(|pattern| (*pattern).to_owned());
        Case::new(format!("sqlite: {name}"), command.into_iter().chain(patterns), PATIENCE, read)
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
        } else if line.contains(" errors out of ") {
            verdicts
                .insert("errors".to_owned(), line.split(" on ").next().unwrap_or(line).to_owned());
        }
    }
    Ok(verdicts)
}
