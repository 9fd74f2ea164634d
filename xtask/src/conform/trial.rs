//! One case of a suite: a command that runs many tests. It is run natively, to learn how each test
//! ends and how much memory the case takes; then with less memory, and each verdict compared.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::stage::{Outcome, Place, Program, Stage, Variant};

/// No program is given less: it is the least that `farmem run` takes.
const LIMIT_MIN_BYTES: u64 = 16 << 20;

/// What stands for the verdict of a test that has none.
const ABSENT: &str = "(absent)";

/// How each test has ended, by its name.
pub(crate) type Verdicts = BTreeMap<String, String>;

/// A command that runs tests, in an empty folder of its own.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
    /// It, and whoever it starts, is killed after this time, natively as under farmem.
    pub(crate) patience: Duration,
    /// It runs as this user, who is not root.
    pub(crate) user: Option<&'static str>,
    /// What the folder has at the start: a command that is run there beforehand.
    pub(crate) furnish: Option<Vec<String>>,
    /// How its tests have ended.
    pub(crate) read: fn(&Ended) -> anyhow::Result<Verdicts>,
}

/// What a run left.
pub(crate) struct Ended {
    pub(crate) folder: PathBuf,
    pub(crate) outcome: Outcome,
}

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        command: impl IntoIterator<Item = impl Into<String>>,
        patience: Duration,
        read: fn(&Ended) -> anyhow::Result<Verdicts>,
    ) -> Self {
        let command = command.into_iter().map(Into::into).collect();
        Self { name: name.into(), command, patience, user: None, furnish: None, read }
    }

    /// Lets it take no longer than `most`, natively as under farmem.
    pub(crate) fn hasten(&mut self, most: Duration) {
        self.patience = self.patience.min(most);
    }

    fn run(&self, stage: &Stage, variant: Variant, limit_bytes: u64) -> anyhow::Result<Shown> {
        let folder = stage.scratch("case");
        if folder.exists() {
            fs::remove_dir_all(&folder).context("empty the folder of the case before")?;
        }
        fs::create_dir(&folder).context("make a folder for the case")?;
        let place = Place { environment: environment(&folder), folder: folder.clone() };
        if let Some(furnish) = &self.furnish {
            let mut command = std::process::Command::new(&furnish[0]);
            command.args(&furnish[1..]).current_dir(&folder);
            let status = command.status().with_context(|| format!("run {furnish:?}"))?;
            ensure!(status.success(), "{furnish:?}: {status}");
        }
        let program = Program {
            command: self.command.clone(),
            watched: None,
            input: None,
            user: self.user,
            place: Some(place),
            patience: self.patience,
        };
        let outcome = stage.start(variant, limit_bytes, &program)?.end()?;
        let ended = Ended { folder, outcome };
        let mut verdicts =
            (self.read)(&ended).with_context(|| format!("read the verdicts of {}", self.name))?;
        if !ended.outcome.late {
            verdicts.insert(the_command(&self.name), ended.outcome.status.to_string());
        }
        Ok(Shown { verdicts, outcome: ended.outcome })
    }
}

/// The name of the verdict on a case's command itself.
fn the_command(case: &str) -> String {
    format!("{case}: the command")
}

fn verdict<'a>(of: &'a Verdicts, test: &str) -> &'a str {
    of.get(test).map_or(ABSENT, String::as_str)
}

/// The same for all runs, whoever starts them.
fn environment(folder: &std::path::Path) -> Vec<(&'static str, String)> {
    vec![
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("HOME", folder.display().to_string()),
        ("LC_ALL", "C.UTF-8".to_owned()),
        ("TERM", "dumb".to_owned()),
        ("PYTHONHASHSEED", "1".to_owned()),
    ]
}

/// A run, and what it showed.
struct Shown {
    verdicts: Verdicts,
    outcome: Outcome,
}

impl Shown {
    /// What farmem has counted; nothing if it was killed, as the time was over.
    fn count(&self, name: &str) -> anyhow::Result<u64> {
        let found = self.outcome.stats.as_ref().and_then(|stats| stats[name].as_u64());
        match found {
            None if self.outcome.late => Ok(0),
            found => found.with_context(|| format!("farmem run left no statistics with {name}")),
        }
    }
}

/// How a case goes without farmem.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Native {
    verdicts: Verdicts,
    /// It was killed, as its time was over.
    pub(crate) late: bool,
    /// The most anonymous memory that its processes had together, or one of them, as far as seen: one
    /// limit holds for all of them.
    pub(crate) together_bytes: u64,
    pub(crate) seconds: f64,
}

impl Native {
    pub(crate) fn of(case: &Case, stage: &Stage) -> anyhow::Result<Self> {
        let shown = case.run(stage, Variant::Native, u64::MAX)?;
        let native = Self {
            late: shown.outcome.late,
            together_bytes: shown
                .outcome
                .peak
                .together_bytes
                .max(shown.outcome.peak.anonymous_bytes),
            seconds: shown.outcome.wall_seconds,
            verdicts: shown.verdicts,
        };
        eprintln!(
            "{}: {} results natively, {:.1} s, {} MiB{}",
            case.name,
            native.verdicts.len(),
            native.seconds,
            native.together_bytes >> 20,
            if native.late { ", TIMED OUT" } else { "" },
        );
        ensure!(!native.verdicts.is_empty(), "{} has no results at all", case.name);
        Ok(native)
    }

    /// The limit that is `share` percent of what the case takes natively.
    pub(crate) fn limit_bytes(&self, share: u64) -> u64 {
        (self.together_bytes * share / 100).max(LIMIT_MIN_BYTES)
    }
}

/// A test that did not end as it does natively.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Difference {
    pub(crate) test: String,
    pub(crate) native: String,
    pub(crate) farmem: String,
    /// Seen again when both were run once more.
    pub(crate) again: bool,
}

/// A case with less memory beside its native run.
#[derive(Clone)]
pub(crate) struct Comparison {
    pub(crate) case: String,
    pub(crate) limit_bytes: u64,
    pub(crate) same: usize,
    pub(crate) differences: Vec<Difference>,
    /// Tests that had not ended when the time was over.
    pub(crate) timed_out: Vec<String>,
    /// Tests that end this way or that natively: they say nothing.
    pub(crate) unsteady: Vec<String>,
    pub(crate) evicted_pages: u64,
    pub(crate) fetched_pages: u64,
    /// What its processes had together natively.
    pub(crate) together_bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) native_seconds: f64,
    /// It was killed, as its time was over, or was so natively.
    pub(crate) late: bool,
    /// It was so natively.
    pub(crate) native_late: bool,
}

impl Comparison {
    pub(crate) fn of(
        case: &Case,
        native: &Native,
        limit_bytes: u64,
        stage: &Stage,
    ) -> anyhow::Result<Self> {
        let shown = case.run(stage, Variant::Unix, limit_bytes)?;
        let mut comparison = Self {
            case: case.name.clone(),
            limit_bytes,
            same: 0,
            differences: Vec::new(),
            timed_out: Vec::new(),
            unsteady: Vec::new(),
            evicted_pages: shown.count("evicted_pages")?,
            fetched_pages: shown.count("fetched_pages")?,
            together_bytes: native.together_bytes,
            seconds: shown.outcome.wall_seconds,
            native_seconds: native.seconds,
            late: shown.outcome.late || native.late,
            native_late: native.late,
        };
        comparison.compare(&native.verdicts, &shown.verdicts, shown.outcome.late || native.late);
        if !comparison.differences.is_empty() {
            comparison.look_again(case, &native.verdicts, stage)?;
        }
        Ok(comparison)
    }

    /// `late`: a test that has no verdict here had no time.
    fn compare(&mut self, native: &Verdicts, farmem: &Verdicts, late: bool) {
        let mut tests: Vec<&String> = native.keys().chain(farmem.keys()).collect();
        tests.sort();
        tests.dedup();
        for test in tests {
            let (native, farmem) = (verdict(native, test), verdict(farmem, test));
            if native == farmem {
                self.same += 1;
            } else if late && (farmem == ABSENT || native == ABSENT) {
                self.timed_out.push(test.clone());
            } else {
                self.differences.push(Difference {
                    test: test.clone(),
                    native: native.to_owned(),
                    farmem: farmem.to_owned(),
                    again: false,
                });
            }
        }
    }

    /// Runs both once more: a test that ends differently natively too is no witness.
    fn look_again(&mut self, case: &Case, first: &Verdicts, stage: &Stage) -> anyhow::Result<()> {
        let native = case.run(stage, Variant::Native, u64::MAX)?.verdicts;
        let farmem = case.run(stage, Variant::Unix, self.limit_bytes)?.verdicts;
        self.settle(first, &native, &farmem);
        Ok(())
    }

    /// `first` and `native` are both native runs, `farmem` is the second one under farmem. A native run
    /// that was late has no verdict on its command, one that crashed another one than before: what is
    /// missing there says nothing of a test.
    fn settle(&mut self, first: &Verdicts, native: &Verdicts, farmem: &Verdicts) {
        let command = the_command(&self.case);
        let is_whole = native.contains_key(&command) && native.get(&command) == first.get(&command);
        for mut difference in std::mem::take(&mut self.differences) {
            let again = verdict(native, &difference.test);
            if again == difference.native || (again == ABSENT && !is_whole) {
                difference.again = verdict(farmem, &difference.test) != difference.native;
                self.differences.push(difference);
            } else {
                self.unsteady.push(difference.test);
            }
        }
    }

    pub(crate) fn wrong(&self) -> usize {
        self.differences.len() + self.timed_out.len()
    }

    /// A result counts only if pages went out while it came about.
    pub(crate) const fn counts(&self) -> bool {
        self.evicted_pages > 0
    }

    /// Nothing went out, though it takes more than its limit: whatever ran, it was not paged.
    pub(crate) const fn is_unpaged(&self) -> bool {
        !self.counts() && !self.late && self.together_bytes > self.limit_bytes
    }

    pub(crate) fn tell(&self, share: u64) {
        eprintln!(
            "{} at {} % ({} MiB): {} same, {} differ, {} timed out, {} unsteady; {} pages evicted, \
             {} fetched, {:.1} s, natively {:.1} s",
            self.case,
            share,
            self.limit_bytes >> 20,
            self.same,
            self.differences.len(),
            self.timed_out.len(),
            self.unsteady.len(),
            self.evicted_pages,
            self.fetched_pages,
            self.seconds,
            self.native_seconds,
        );
        if self.is_unpaged() {
            eprintln!("  NOTHING WAS PAGED OUT of {} MiB", self.together_bytes >> 20);
        }
        for Difference { test, native, farmem, again } in &self.differences {
            let again = if *again { "again" } else { "once" };
            eprintln!("  DIFFERS ({again}): {test}: {native} natively, {farmem} under farmem");
        }
        for test in self.timed_out.iter().take(10) {
            eprintln!("  TIMED OUT: {test}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(of: &[(&str, &str)]) -> Verdicts {
        of.iter().map(|&(test, verdict)| (test.to_owned(), verdict.to_owned())).collect()
    }

    fn compared(native: &[(&str, &str)], farmem: &[(&str, &str)], late: bool) -> Comparison {
        let mut comparison = Comparison {
            case: "case".to_owned(),
            limit_bytes: 1,
            same: 0,
            differences: Vec::new(),
            timed_out: Vec::new(),
            unsteady: Vec::new(),
            evicted_pages: 1,
            fetched_pages: 1,
            together_bytes: 2,
            seconds: 1.0,
            native_seconds: 1.0,
            late,
            native_late: false,
        };
        comparison.compare(&verdicts(native), &verdicts(farmem), late);
        comparison
    }

    #[test]
    fn a_test_that_ends_otherwise_or_not_at_all_differs() {
        let native = [("a", "ok"), ("b", "ok"), ("c", "FAIL")];
        let found = compared(&native, &[("a", "ok"), ("b", "FAIL"), ("d", "ok")], false);
        assert_eq!(found.same, 1);
        let tests: Vec<_> = found.differences.iter().map(|found| found.test.as_str()).collect();
        assert_eq!(tests, ["b", "c", "d"]);
        assert_eq!(found.differences[1].farmem, "(absent)");
    }

    #[test]
    fn a_test_that_had_no_time_is_told_apart_from_one_that_failed() {
        let found = compared(&[("a", "ok"), ("b", "ok")], &[("a", "FAIL")], true);
        assert_eq!((found.same, found.timed_out.as_slice()), (0, &["b".to_owned()][..]));
        assert_eq!(found.differences.len(), 1);
    }

    #[test]
    fn a_result_that_only_farmem_has_stays_a_difference() {
        let native = [("a", "ok"), ("case: the command", "exit status: 0")];
        let farmem = [("a", "ok"), ("d", "FAIL"), ("case: the command", "exit status: 0")];
        let mut found = compared(&native, &farmem, false);
        found.settle(&verdicts(&native), &verdicts(&native), &verdicts(&farmem));
        assert_eq!((found.wrong(), found.unsteady.len()), (1, 0));
        let Difference { test, native, farmem, again } = &found.differences[0];
        assert_eq!((test.as_str(), native.as_str(), farmem.as_str()), ("d", "(absent)", "FAIL"));
        assert!(again);
    }

    #[test]
    fn a_second_native_run_that_did_not_get_there_clears_nothing() {
        let (whole, crashed) = ("exit status: 0", "signal: 6 (SIGABRT)");
        let first = [("a", "ok"), ("b", "ok"), ("case: the command", whole)];
        let farmem = [("a", "FAIL"), ("b", "FAIL"), ("case: the command", whole)];
        for (native, differ, unsteady) in [
            // Late: its command has no verdict.
            (&[("b", "FAIL")][..], &["a"][..], &["b"][..]),
            (&[("b", "ok"), ("case: the command", crashed)], &["a", "b"], &[]),
            (&[("b", "ok"), ("case: the command", whole)], &["b"], &["a"]),
        ] {
            let mut found = compared(&first, &farmem, false);
            found.settle(&verdicts(&first), &verdicts(native), &verdicts(&farmem));
            let tests: Vec<_> = found.differences.iter().map(|found| &found.test).collect();
            assert_eq!(tests, differ, "{native:?}");
            assert_eq!(found.unsteady, unsteady, "{native:?}");
            assert!(found.differences.iter().all(|difference| difference.again));
        }
    }
}
