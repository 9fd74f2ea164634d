//! What the runs have shown: docs/programs.json, and docs/programs.md, which is made from it. A run
//! replaces the rows that it has made and leaves the others.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::oracle;
use crate::provenance::Provenance;

const JSON: &str = "docs/programs.json";
const PAGE: &str = "docs/programs.md";

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// By the program's name, then by the share of its native peak in percent.
    programs: BTreeMap<String, BTreeMap<u64, Row>>,
    /// Runs of the oracle, in the order in which they were made.
    #[serde(default)]
    pub(super) oracle: Vec<oracle::Run>,
}

/// A program with one share of its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    /// "same", or what was wrong.
    pub(super) result: String,
    pub(super) limit_bytes: u64,
    pub(super) peak_bytes: u64,
    pub(super) evicted_pages: u64,
    pub(super) seconds: f64,
    pub(super) native_seconds: f64,
    pub(super) of: Provenance,
}

impl Record {
    pub(super) fn read(workspace: &Path) -> anyhow::Result<Self> {
        let file = workspace.join(JSON);
        if !file.exists() {
            return Ok(Self::default());
        }
        let text = fs::read(&file).with_context(|| format!("read {JSON}"))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {JSON}"))
    }

    pub(super) fn put(&mut self, program: &str, share: u64, row: Row) {
        self.programs.entry(program.to_owned()).or_default().insert(share, row);
    }

    pub(super) fn write(&self, workspace: &Path) -> anyhow::Result<()> {
        let json = serde_json::to_string_pretty(self).context("write JSON")? + "\n";
        fs::write(workspace.join(JSON), json).with_context(|| format!("write {JSON}"))?;
        fs::write(workspace.join(PAGE), self.page()).with_context(|| format!("write {PAGE}"))
    }

    fn page(&self) -> String {
        let mut page = HEAD.to_owned();
        for (program, rows) in &self.programs {
            for (share, row) in rows.iter().rev() {
                let above = (row.peak_bytes as f64 - row.limit_bytes as f64) / 1048576.0;
                let _ = writeln!(
                    page,
                    "| {program} | {share} % | {} | {} | {} | {above:.1} | {:.1} | {:.1} | {} |",
                    row.limit_bytes >> 20,
                    row.result,
                    row.evicted_pages,
                    row.seconds,
                    row.native_seconds,
                    row.of,
                );
            }
        }
        if !self.oracle.is_empty() {
            page += &oracle::page(&self.oracle);
        }
        page
    }
}

const HEAD: &str = "\
# Real programs beside their native runs

Whole programs with a share of the memory that they take natively, and at least 16 MiB: what they
print, or the field of it that is no time, must be what they print natively. Redis is asked for every
key. A result below 100 % counts only if pages were evicted. This page is made by `cargo xtask verify`
from docs/programs.json; numbers are those of runs that were made.

* sort: GNU sort of 1.5 GiB of lines with a buffer for all of them.
* dict: python3 fills and checks a dict of 4 million entries.
* sqlite: sqlite3 builds, joins and sorts tables in memory.
* gcc: cc1 compiles 6,000 functions to assembler text.
* redis: redis-server with half a GiB of values, under redis-benchmark, read key by key.
* stamp: two threads stamp pages with their number and version and check every load, while others
  move, drop, protect and fork them.
* counter: two threads count in shared pages; no increment may be lost.

Seconds are of a machine that did other work meanwhile, with farmem at the lowest priority: they say
how long it takes to repeat this, not how fast farmem is (docs/performance.md does). What is above the
limit is the largest resident size (RssAnon) that was seen, less the limit.

| program | local | limit MiB | result | pages evicted | MiB above limit | seconds | natively | measured |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::workspace;

    #[test]
    fn the_page_is_that_of_the_record() {
        let page = fs::read_to_string(workspace().join(PAGE)).unwrap();
        let record = Record::read(workspace()).unwrap();
        assert_eq!(page, record.page(), "`cargo xtask verify` writes both");
    }
}
