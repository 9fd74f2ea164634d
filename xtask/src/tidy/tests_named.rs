//! Pages that name the test of each statement: the tests exist.

use super::{Findings, Source};

/// In these every word between backticks that looks like a function and stands in the last column
/// of a table is a test.
const PAGES: [&str; 2] = ["docs/failure-model.md", "docs/traps.md"];

/// Rows of docs/traps.md: the traps of userfaultfd, U1 to this one.
const TRAPS: usize = 38;

pub(super) fn check(sources: &[Source], findings: &mut Findings) {
    let exists = |name: &str| {
        let head = format!("fn {name}(");
        sources.iter().any(|source| source.is_rust() && source.text.contains(&head))
    };
    for page in PAGES {
        let Some(source) = sources.iter().find(|source| source.path == page) else {
            findings.push(format!("{page} is missing"));
            continue;
        };
        for (line, name) in tests_in(&source.text).filter(|(_, name)| !exists(name)) {
            findings.push(format!("{page}:{line}: there is no test {name}"));
        }
    }
    let traps = sources.iter().find(|source| source.path == PAGES[1]);
    if let Some(traps) = traps {
        let has_row = |trap: &usize| traps.text.contains(&format!("\n| U{trap} |"));
        for trap in (1..=TRAPS).filter(|trap| !has_row(trap)) {
            findings.push(format!("{}: there is no row for U{trap}", PAGES[1]));
        }
    }
}

/// The tests that the tables name, each with its line.
fn tests_in(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let rows = text.lines().enumerate().filter(|(_, line)| line.starts_with('|'));
    rows.flat_map(|(at, line)| {
        let last = line.trim_end_matches([' ', '|']).rsplit('|').next().unwrap_or_default();
        last.split('`')
            .skip(1)
            .step_by(2)
            .filter(|name| is_test(name))
            .map(move |name| (at + 1, name))
    })
}

/// Several words, as the names of tests are; no path, option or file.
fn is_test(name: &str) -> bool {
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    name.matches('_').count() > 1 && name.chars().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_what_the_last_column_names() {
        let text = "`a_b_c` here\n| x `no_test_here` | `a_test_of_x`, `file.rs`, `--page` |\n";
        assert_eq!(tests_in(text).collect::<Vec<_>>(), [(2, "a_test_of_x")]);
    }

    #[test]
    fn a_test_that_is_not_there_is_found() {
        let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
        let rows: String =
            (1..=TRAPS).map(|trap| format!("\n| U{trap} | x | `a_test_of_it` |")).collect();
        let sources = [
            source(PAGES[0], "| x | `no_such_test_is_there` |"),
            source(PAGES[1], &rows),
            source("crates/a/src/lib.rs", "fn a_test_of_it() {}"),
        ];
        let mut findings = Findings::new();
        check(&sources, &mut findings);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].contains("no_such_test_is_there"));
    }
}
