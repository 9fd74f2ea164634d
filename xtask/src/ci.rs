//! `cargo xtask ci`: everything that a change must pass, on any machine. Goes on after a failure,
//! so that one run shows all of them, and ends with one line of counts.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::build::{self, workspace};
use crate::conform;
use crate::tidy;
use crate::verify;

/// How many tests passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

impl Count {
    /// Counts one step: a check that either passes or fails.
    fn step(&mut self, name: &str, step: impl FnOnce() -> anyhow::Result<()>) {
        match timed(name, step) {
            Ok(()) => self.passed += 1,
            Err(error) => {
                self.failed += 1;
                eprintln!("== {name} failed: {error:#}");
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "the count is the result")]
pub(crate) fn ci() -> anyhow::Result<()> {
    let in_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    let mut count = Count::default();
    count.step("format", || build::cargo(&["fmt", "--all", "--check"]));
    count.step("lints", || {
        let all = ["clippy", "--workspace", "--all-targets"];
        build::cargo(all.iter().chain(&["--", "-D", "warnings"]))
    });
    count.step("tidy", tidy::tidy);
    count.step("build", || {
        build::cargo(&["build", "--workspace"])?;
        // After the line above, which links the pager like any other program.
        build::shipped(false).map(drop)
    });
    count.step("documentation", documentation);

    let (tests, failures) = timed("tests", tests)?;
    count.passed += tests.passed;
    count.failed += tests.failed;
    count.skipped += tests.skipped;

    match timed("real programs", verify::for_ci) {
        Ok(verify::Tally { same, wrong }) => {
            count.passed += same;
            count.failed += wrong;
        }
        Err(error) => {
            count.failed += 1;
            eprintln!("== real programs failed: {error:#}");
        }
    }

    match timed("test suites", conform::for_ci) {
        Ok(conform::Tally { same, wrong }) => {
            count.passed += same;
            count.failed += wrong;
        }
        Err(error) => {
            count.failed += 1;
            eprintln!("== test suites failed: {error:#}");
        }
    }

    if in_ci && count.skipped > 0 {
        eprintln!("where CI is true nothing may be skipped: a skipped test proves nothing");
        count.failed += count.skipped;
        count.skipped = 0;
    }
    // Once more, where whoever looks at the end of a long output finds it.
    if !failures.is_empty() {
        eprintln!("\n== what failed");
        failures.iter().for_each(|line| eprintln!("{line}"));
    }
    println!("{count}");
    std::io::stdout().flush()?;
    ensure!(count.failed == 0, "{} checks failed", count.failed);
    Ok(())
}

/// Takes a step, and says how long it took.
fn timed<T>(name: &str, step: impl FnOnce() -> T) -> T {
    eprintln!("\n== {name}");
    let started = Instant::now();
    let result = step();
    eprintln!("== {name}: {} s", started.elapsed().as_secs());
    result
}

fn documentation() -> anyhow::Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args([
        "doc",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
    // Links to private items are for those who read the source.
    command.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links");
    let status = command.status().context("run cargo doc")?;
    ensure!(status.success(), "cargo doc failed: {status}");
    Ok(())
}

/// Runs all tests, shows what they print, and counts. Returns what those printed that failed, too.
fn tests() -> anyhow::Result<(Count, Vec<String>)> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let arguments = ["test", "--workspace", "--no-fail-fast", "--", "--show-output"];
    command.current_dir(workspace()).args(arguments).stdout(Stdio::piped());
    let mut child = command.spawn().context("run cargo test")?;
    let output = child.stdout.take().context("output of cargo test")?;
    let mut count = Count::default();
    let mut failures = Failures::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("read the output of cargo test")?;
        eprintln!("{line}");
        count_line(&line, &mut count);
        failures.read(line);
    }
    let status = child.wait().context("wait for cargo test")?;
    // A test binary that was killed, or did not compile, prints no count of its own.
    if !status.success() && count.failed == 0 {
        count.failed = 1;
    }
    Ok((count, failures.lines))
}

/// Lines of one test that failed, at most.
const FAILURE_LINES_MAX: usize = 60;

/// What the tests printed that failed: a test binary lists it after the word `failures:`, test by test,
/// and then, after the same word, their names.
#[derive(Debug, Default)]
struct Failures {
    lines: Vec<String>,
    listing: bool,
    /// Lines of the test that is listed.
    of_test: usize,
}

impl Failures {
    fn read(&mut self, line: String) {
        if line == "failures:" {
            self.listing = !self.listing;
        } else if line.starts_with("test result: ") {
            self.listing = false;
        } else if self.listing {
            self.of_test = if line.starts_with("---- ") { 0 } else { self.of_test + 1 };
            if self.of_test < FAILURE_LINES_MAX {
                self.lines.push(line);
            }
        }
    }
}

/// Counts what one line of a test binary says. A test that lacks a privilege prints
/// `skipped: reason` and passes, as far as its binary can tell. What is ignored is skipped too,
/// but for the parts that a test binary plays for its own tests.
fn count_line(line: &str, count: &mut Count) {
    if line.starts_with("skipped: ") {
        count.skipped += 1;
        count.passed = count.passed.saturating_sub(1);
        return;
    }
    if line.contains(" ... ignored") && !line.contains(" ... ignored, not a test: ") {
        count.skipped += 1;
    }
    let Some(result) = line.strip_prefix("test result: ") else {
        return;
    };
    for part in result.split([';', '.']) {
        let Some((number, what)) = part.trim().split_once(' ') else {
            continue;
        };
        let number = number.parse().unwrap_or(0);
        match what {
            "passed" => count.passed += number,
            "failed" => count.failed += number,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_said_again() {
        let long = "of many lines\n".repeat(2 * FAILURE_LINES_MAX);
        let text = format!(
            "test a ... FAILED\nsuccesses:\n\n---- c stdout ----\nfine\n\nfailures:\n\n---- a stdout ----\n\
             {long}---- b stdout ----\nthis\n\nfailures:\n    a\n    b\n\ntest result: FAILED. 1 passed\nlater"
        );
        let mut failures = Failures::default();
        text.lines().for_each(|line| failures.read(line.to_owned()));
        let said: Vec<_> = failures.lines.iter().filter(|line| *line != "of many lines").collect();
        assert_eq!(said, ["", "---- a stdout ----", "---- b stdout ----", "this", ""]);
        assert_eq!(failures.lines.len(), FAILURE_LINES_MAX + 4);
    }

    #[test]
    fn results_of_test_binaries_are_summed() {
        let lines = [
            "test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.05s",
            "test a::b ... ok",
            "test a::c ... ignored, too slow",
            "test a::d ... ignored, not a test: what the others start",
            "skipped: no userfaultfd here",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out",
        ];
        let mut count = Count::default();
        lines.iter().for_each(|line| count_line(line, &mut count));
        assert_eq!(count, Count { passed: 5, failed: 3, skipped: 2 });
        assert_eq!(count.to_string(), "5 passed, 3 failed, 2 skipped");
    }
}
