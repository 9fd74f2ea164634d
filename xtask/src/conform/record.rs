//! What the runs have shown: docs/conformance.json, and docs/conformance.md, which is made from it.
//! A run replaces the rows that it has measured and leaves the others.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::suites::{Name, Suite};
use super::trial::{Comparison, Difference};
use crate::provenance::Provenance;

const JSON: &str = "docs/conformance.json";
/// Of a case that has timed out, so many tests are named: it may have thousands.
const TIMED_OUT_NAMED: usize = 3;
const PAGE: &str = "docs/conformance.md";

/// Everything that was found, suite by suite.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    suites: BTreeMap<String, Found>,
}

/// What was found with one suite.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Found {
    /// What it is and of which version.
    source: String,
    /// By the share of the native peak, in percent.
    rows: BTreeMap<u64, Row>,
}

/// One suite with one share of its memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Cases that were run, and how many the suite has.
    cases: Vec<String>,
    cases_all: usize,
    /// Results that are those of the native run.
    same: usize,
    /// Those of them that came about while pages were evicted.
    counted: usize,
    differences: Vec<Difference>,
    timed_out: Vec<String>,
    /// Tests that have timed out beside those: of a case, [`TIMED_OUT_NAMED`] are named.
    #[serde(default)]
    timed_out_more: usize,
    unsteady: Vec<String>,
    /// Cases that had not ended after so many seconds, which `--patience` said.
    #[serde(default)]
    cut_short: BTreeMap<String, u64>,
    /// Cases that had ended within that time natively, and had not under farmem.
    #[serde(default)]
    outlasted: BTreeMap<String, Outlasted>,
    evicted_pages: u64,
    fetched_pages: u64,
    seconds: f64,
    native_seconds: f64,
    /// When its cases were run, and of which commit.
    of: Vec<Provenance>,
}

/// A case that takes more than `--patience` gave it, under farmem alone.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Outlasted {
    patience: u64,
    native_seconds: f64,
    /// Tests that had not ended.
    tests: usize,
}

impl Row {
    pub(crate) fn new(cases_all: usize) -> Self {
        Self { cases_all, ..Self::default() }
    }

    /// `patience`: of how many seconds each run had, if it was less than its suite gives.
    pub(crate) fn add(&mut self, found: &Comparison, patience: Option<u64>) {
        self.cut_short.remove(&found.case);
        self.outlasted.remove(&found.case);
        if let (true, Some(patience)) = (found.late && found.differences.is_empty(), patience) {
            if found.native_late {
                self.cut_short(&found.case, patience);
            } else {
                let (native_seconds, tests) = (found.native_seconds, found.timed_out.len());
                let outlasted = Outlasted { patience, native_seconds, tests };
                self.outlasted.insert(found.case.clone(), outlasted);
            }
            return;
        }
        self.cases.push(found.case.clone());
        self.same += found.same;
        self.counted += if found.counts() { found.same } else { 0 };
        self.differences.extend(found.differences.iter().cloned());
        self.timed_out.extend(found.timed_out.iter().take(TIMED_OUT_NAMED).cloned());
        self.timed_out_more += found.timed_out.len().saturating_sub(TIMED_OUT_NAMED);
        self.unsteady.extend(found.unsteady.iter().cloned());
        self.evicted_pages += found.evicted_pages;
        self.fetched_pages += found.fetched_pages;
        self.seconds += found.seconds;
        self.native_seconds += found.native_seconds;
    }

    /// The case had no more than so many seconds, and not ended, natively neither.
    pub(crate) fn cut_short(&mut self, case: &str, seconds: u64) {
        self.cut_short.insert(case.to_owned(), seconds);
    }

    /// Whether the case has been run, or has not ended with as much patience before.
    pub(crate) fn has(&self, case: &str, patience: Option<u64>) -> bool {
        let natively = self.cut_short.get(case).copied();
        let before = natively.max(self.outlasted.get(case).map(|of| of.patience)).unwrap_or(0);
        self.cases.iter().any(|known| known == case) || before >= patience.unwrap_or(u64::MAX)
    }

    fn timed_out(&self) -> usize {
        let outlasted: usize = self.outlasted.values().map(|of| of.tests).sum();
        self.timed_out.len() + self.timed_out_more + outlasted
    }

    fn wrong(&self) -> usize {
        self.differences.len() + self.timed_out()
    }

    /// Under farmem, and natively.
    fn seconds(&self) -> (f64, f64) {
        let outlasted = || self.outlasted.values();
        let farmem: f64 = outlasted().map(|of| of.patience as f64).sum();
        let native: f64 = outlasted().map(|of| of.native_seconds).sum();
        (self.seconds + farmem, self.native_seconds + native)
    }
}

impl Record {
    pub(crate) fn read(workspace: &Path) -> anyhow::Result<Self> {
        let file = workspace.join(JSON);
        if !file.exists() {
            return Ok(Self::default());
        }
        let text = fs::read(&file).with_context(|| format!("read {JSON}"))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {JSON}"))
    }

    /// What is known of a suite with a share of its memory, if it is of the same version.
    pub(crate) fn row(&self, suite: &Suite, share: u64) -> Option<&Row> {
        let found = self.suites.get(&suite.name.to_string())?;
        (found.source == suite.source).then(|| found.rows.get(&share))?
    }

    pub(crate) fn put(&mut self, suite: &Suite, share: u64, mut row: Row) {
        row.cases_all = suite.cases.len();
        let now = Provenance::now();
        if !row.of.contains(&now) {
            row.of.push(now);
        }
        let found = self.suites.entry(suite.name.to_string()).or_default();
        if found.source != suite.source {
            // Results of another version of the suite stand for nothing beside these.
            found.rows.clear();
            found.source.clone_from(&suite.source);
        }
        found.rows.insert(share, row);
    }

    pub(crate) fn write(&self, workspace: &Path) -> anyhow::Result<()> {
        let json = serde_json::to_string_pretty(self).context("write JSON")? + "\n";
        fs::write(workspace.join(JSON), json).with_context(|| format!("write {JSON}"))?;
        fs::write(workspace.join(PAGE), self.page()).with_context(|| format!("write {PAGE}"))
    }

    /// The suites in the order in which they are run.
    fn in_order(&self) -> impl Iterator<Item = (&str, &Found)> {
        let names = Name::all().iter().map(ToString::to_string);
        names.filter_map(|name| self.suites.get_key_value(&name)).map(|(n, f)| (n.as_str(), f))
    }

    fn page(&self) -> String {
        let mut page = String::from(HEAD);
        page += "| suite | local | cases | results | same | counted | differ | timed out | unsteady | pages evicted | fetched | seconds | natively |\n";
        page += "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
        for (name, found) in self.in_order() {
            for (share, row) in found.rows.iter().rev() {
                let (seconds, native_seconds) = row.seconds();
                let results = row.same + row.wrong() + row.unsteady.len();
                let _ = writeln!(
                    page,
                    "| {name} | {share} % | {} of {} | {results} | {} | {} | {} | {} | {} | {} | {} | {:.0} | {:.0} |",
                    row.cases.len() + row.outlasted.len(),
                    row.cases_all,
                    row.same,
                    row.counted,
                    row.differences.len(),
                    row.timed_out(),
                    row.unsteady.len(),
                    row.evicted_pages,
                    row.fetched_pages,
                    seconds,
                    native_seconds,
                );
            }
        }
        page += "\n## Suites\n\n| suite | what | measured |\n| --- | --- | --- |\n";
        for (name, found) in self.in_order() {
            let mut when: Vec<String> =
                found.rows.values().flat_map(|row| &row.of).map(ToString::to_string).collect();
            when.sort();
            when.dedup();
            let _ = writeln!(page, "| {name} | {} | {} |", found.source, when.join(", "));
        }
        page += "\n## Differences\n\n";
        page += &self.differences();
        page
    }

    fn differences(&self) -> String {
        let mut lines = String::new();
        for (name, found) in self.in_order() {
            for (share, row) in found.rows.iter().rev() {
                for Difference { test, native, farmem, again } in &row.differences {
                    let again = if *again { "" } else { "; not when both were run once more" };
                    let _ = writeln!(
                        lines,
                        "* {name}, {share} %: `{test}`: {native} natively, {farmem} under farmem{again}"
                    );
                }
                for test in &row.timed_out {
                    let _ = writeln!(lines, "* {name}, {share} %: `{test}`: timed out");
                }
                if row.timed_out_more > 0 {
                    let more = row.timed_out_more;
                    let _ = writeln!(lines, "* {name}, {share} %: {more} others: timed out");
                }
                for (case, Outlasted { patience, native_seconds, tests }) in &row.outlasted {
                    let _ = writeln!(
                        lines,
                        "* {name}, {share} %: `{case}`: {tests} tests timed out after {patience} s, natively all \
                         had ended after {native_seconds:.0} s"
                    );
                }
                for (case, seconds) in &row.cut_short {
                    let _ = writeln!(
                        lines,
                        "* {name}, {share} %: `{case}`: not ended after {seconds} s, not compared"
                    );
                }
                for test in &row.unsteady {
                    let _ = writeln!(lines, "* {name}, {share} %: `{test}`: unsteady natively");
                }
            }
        }
        if lines.is_empty() { "None.\n".to_owned() } else { lines }
    }
}

const HEAD: &str = "\
# Conformance

Real test suites, natively and under `farmem run`: each test must end as it does without farmem.
This page is made by `cargo xtask conform` from docs/conformance.json; numbers are those of runs
that were made.

Each case, a command that runs many tests, is run natively first. The local limit is the share
named below of the most anonymous memory that its processes had together then, and at least 16 MiB:
where two shares come to the same limit, one run stands for both. What was measured up to commit 21a9015
had a share of what one of the processes had, which is less.
A result *counts* only if pages were evicted while its case ran. A test that had not ended when the
time was over, which is the same natively and under farmem, has *timed out*. Where a test ends
otherwise, both are run once more; what ends this way or that natively is *unsteady* and says
nothing. A case that was given less time than its suite gives has *timed out* where it had ended natively by
then; where it had not, it is listed as not compared. Up to commit 124a93a both were listed as not compared, and what is
listed below of those commits does not say which it was. A suite whose row says fewer cases than it has was not run to its end. Shares and suites
without a row have not been measured, nor has a case that was given less time than it takes: `cargo xtask conform` measures them, `--short` is the part that
every change must pass.

Seconds are of a machine that did other work meanwhile: they say how long it takes to repeat this, not
how fast farmem is.

";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::workspace;

    fn found(late: bool) -> Comparison {
        Comparison {
            case: "case".to_owned(),
            limit_bytes: 1,
            same: 3,
            differences: Vec::new(),
            timed_out: Vec::new(),
            unsteady: Vec::new(),
            evicted_pages: 1,
            fetched_pages: 1,
            together_bytes: 2,
            seconds: 1.0,
            native_seconds: 1.0,
            late,
            native_late: late,
        }
    }

    #[test]
    fn a_case_that_was_cut_short_is_run_again_with_more_patience_only() {
        let mut row = Row::new(1);
        row.add(&found(true), Some(60));
        assert_eq!((row.same, row.cases.len()), (0, 0));
        assert!(row.has("case", Some(60)));
        assert!(!row.has("case", Some(61)));
        assert!(!row.has("case", None), "as much as the suite gives");
        row.add(&found(false), None);
        assert_eq!((row.same, row.cut_short.len()), (3, 0));
        assert!(row.has("case", Some(61)));
        row.add(&found(true), None);
        assert_eq!(row.same, 6, "with all its patience it has its results, late or not");
    }

    #[test]
    fn a_case_that_only_farmem_does_not_end_has_timed_out() {
        let mut record = Record::default();
        let mut row = Row::new(1);
        let timed_out = vec!["a".to_owned(), "b".to_owned()];
        let hangs = Comparison { native_late: false, timed_out, ..found(true) };
        row.add(&hangs, Some(60));
        assert_eq!((row.wrong(), row.cut_short.len(), row.has("case", Some(60))), (2, 0, true));
        assert!(!row.has("case", Some(61)), "with more patience it is run again");
        let rows = BTreeMap::from([(10, row.clone())]);
        let found_in = Found { source: "a".to_owned(), rows };
        record.suites.insert(Name::Numpy.to_string(), found_in);
        let page = record.page();
        assert!(
            page.contains("| numpy | 10 % | 1 of 1 | 2 | 0 | 0 | 0 | 2 | 0 | 0 | 0 | 60 | 1 |"),
            "{page}"
        );
        let line =
            "* numpy, 10 %: `case`: 2 tests timed out after 60 s, natively all had ended after 1 s";
        assert!(page.contains(line), "{page}");
        row.add(&found(false), None);
        assert_eq!((row.same, row.wrong(), row.seconds()), (3, 0, (1.0, 1.0)));
    }

    #[test]
    fn the_page_is_that_of_the_record() {
        let page = fs::read_to_string(workspace().join(PAGE)).unwrap();
        let record = Record::read(workspace()).unwrap();
        assert_eq!(page, record.page(), "`cargo xtask conform --page` makes it anew");
    }
}
