//! Rules for single files: length, names, where `unsafe` may stand, what must not be left behind.

use super::{Findings, Source};

/// A file that is longer has won the fight over where new code goes.
const FILE_LINES_MAX: usize = 1000;

/// A function that is longer does not fit on a screen.
const FUNCTION_LINES_MAX: usize = 70;

/// Longer functions and files, with the reason why they are better whole.
const LONG: [(&str, &str); 0] = [];

/// Where unsafe code may stand: `vmem` changes address spaces, `transport` hands descriptors over,
/// `preload` and `pagerd` run inside foreign processes, `workloads` misuses memory on purpose, the
/// pager's tests page their own, the client's fork, one test of the network store counts allocations, and the
/// supervisor needs signal masks, pre_exec and getrusage.
const UNSAFE_PLACES: [&str; 9] = [
    "crates/vmem/",
    "crates/transport/",
    "crates/preload/",
    "crates/pagerd/",
    "crates/workloads/",
    "crates/client/tests/",
    "crates/pager/tests/",
    "crates/remote/tests/no_allocation.rs",
    "crates/supervise/src/process.rs",
];

/// Roots of crates whose unsafe code is in one module only and which therefore cannot forbid it.
const UNSAFE_ROOTS: [&str; 1] = ["crates/supervise/src/lib.rs"];

/// Names that say nothing, so that everything goes in.
const DRAWERS: [&str; 7] = ["common", "util", "utils", "helper", "helpers", "misc", "stdx"];

pub(super) fn check(source: &Source, findings: &mut Findings) {
    let path = &source.path;
    for part in path.split('/') {
        let stem = part.split('.').next().unwrap_or_default();
        if DRAWERS.contains(&stem) {
            findings.push(format!("{path}: {stem} is a drawer; name it after its job"));
        }
    }
    check_leftovers(source, findings);
    if source.is_rust() {
        // A test that goes through a table or a story of many steps is read once, from the top.
        if !path.contains("/tests/") {
            check_lengths(source, findings);
        }
        check_unsafe(source, findings);
        if !source.text.starts_with("//!") && !source.text.starts_with("#!") {
            findings.push(format!("{path}: must open with //! saying what it owns"));
        }
    }
}

/// Words that must not stay in the repository. Spelled in two parts so that this file may.
fn check_leftovers(source: &Source, findings: &mut Findings) {
    let leftovers = [
        (concat!("todo", "!("), "unfinished"),
        (concat!("unimple", "mented!("), "unfinished"),
        (concat!("FIX", "ME"), "unfinished"),
        (concat!("#[ig", "nore"), "a test that does not run"),
        (concat!("/wo", "rk/"), "a path of one machine"),
        (concat!("/fa", "rm/"), "a path of one machine"),
        (concat!("/ho", "me/"), "a path of one machine"),
        (concat!("/ro", "ot/"), "a path of one machine"),
    ];
    // What tests start from their own binary to play another program's part is no test.
    let role = concat!("#[ig", "nore = \"not a test: ");
    let lines = (1..).zip(source.text.lines()).filter(|(_, line)| !line.contains(role));
    for (number, line) in lines {
        for (word, reason) in leftovers {
            if line.match_indices(word).any(|(at, _)| !continues_a_path(&line[..at], word)) {
                findings.push(format!("{}:{number}: {word} is {reason}", source.path));
            }
        }
    }
}

/// Whether `word` is a later part of a longer path, such as `a/b/` in `x/a/b/`.
fn continues_a_path(before: &str, word: &str) -> bool {
    let letter = |c: char| c.is_alphanumeric() || "_.-".contains(c);
    word.starts_with('/') && before.ends_with(letter)
}

fn check_lengths(source: &Source, findings: &mut Findings) {
    let Source { path, text } = source;
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > FILE_LINES_MAX && !is_listed(path, "") {
        let found = lines.len();
        findings.push(format!("{path}: {found} lines; split it by the state that it owns"));
    }
    for (number, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let length = function_length(&lines[number..]);
        if length > FUNCTION_LINES_MAX && !is_listed(path, name) {
            let at = number + 1;
            findings.push(format!("{path}:{at}: function {name} has {length} lines"));
        }
    }
}

fn is_listed(path: &str, name: &str) -> bool {
    let place = if name.is_empty() { path.to_owned() } else { format!("{path} {name}") };
    LONG.iter().any(|(listed, _)| *listed == place)
}

/// The name, if the line begins a function.
fn function_name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("fn ")?;
    let qualifiers =
        ["pub", "pub(crate)", "pub(super)", "const", "unsafe", "async", "extern", "\"C\""];
    let begins = before.split_whitespace().all(|word| qualifiers.contains(&word));
    let name = after.split(['(', '<']).next()?;
    (begins && !name.is_empty()).then_some(name)
}

/// Lines up to the closing brace. rustfmt puts it under the first letter of the function.
fn function_length(lines: &[&str]) -> usize {
    let first = lines[0];
    let indent = &first[..first.len() - first.trim_start().len()];
    let ends = |line: &&str| {
        let rest = line.strip_prefix(indent);
        // A body, or a declaration without one, or one whose body fits in its last line.
        rest == Some("}")
            || (line.ends_with([';', '}']) && line.len() > indent.len() + 1)
                && rest.is_some_and(|rest| !rest.starts_with(' '))
    };
    lines.iter().position(ends).map_or(lines.len(), |end| end + 1)
}

fn check_unsafe(source: &Source, findings: &mut Findings) {
    let Source { path, text } = source;
    let allowed = UNSAFE_PLACES.iter().any(|place| path.starts_with(place));
    let words = ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern ", "unsafe("];
    if !allowed && !path.starts_with("xtask/src/tidy/") && words.iter().any(|w| text.contains(w)) {
        findings.push(format!("{path}: unsafe code belongs in {}", UNSAFE_PLACES.join(", ")));
    }
    let root = path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    let exempt = allowed || UNSAFE_ROOTS.contains(&path.as_str());
    if root && !exempt && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(format!("{path}: must say #![forbid(unsafe_code)]"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Findings {
        let mut findings = Findings::new();
        check(&Source { path: path.to_owned(), text: text.to_owned() }, &mut findings);
        findings
    }

    #[test]
    fn a_good_file_has_no_findings() {
        let text = "//! Owns x.\n#![forbid(unsafe_code)]\nfn f() {\n    g();\n}\n";
        assert_eq!(findings("crates/region/src/lib.rs", text), Findings::new());
    }

    #[test]
    fn long_functions_are_found_and_short_ones_after_them_are_not() {
        let long =
            format!("//! X.\nfn long() {{\n{}}}\nfn short() {{}}\n", "    g();\n".repeat(69));
        let found = findings("crates/region/src/x.rs", &long);
        assert_eq!(found, ["crates/region/src/x.rs:2: function long has 71 lines"]);
        let fits = long.replacen("    g();\n", "", 1);
        assert_eq!(findings("crates/region/src/x.rs", &fits), Findings::new());
    }

    #[test]
    fn long_files_are_found() {
        let found = findings("crates/region/src/x.rs", &"//! X.\n".repeat(1001));
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn unsafe_code_outside_its_crates_is_found() {
        let text = concat!("//! X.\nfn f() {\n    un", "safe { g() }\n}\n");
        assert_eq!(findings("crates/region/src/x.rs", text).len(), 1);
        assert_eq!(findings("crates/vmem/src/x.rs", text), Findings::new());
        assert_eq!(findings("crates/pager/src/lib.rs", "//! X.\n").len(), 1);
    }

    #[test]
    fn leftovers_and_drawers_are_found() {
        assert_eq!(findings("a/x.md", concat!("see /wo", "rk/x")).len(), 1);
        assert_eq!(findings("a/x.md", concat!("see net/wo", "rk/x")).len(), 0);
        assert_eq!(findings("a/x.rs", concat!("//! X.\n// FIX", "ME\n")).len(), 1);
        assert_eq!(findings("crates/x/src/utils.rs", "//! X.\n").len(), 1);
        assert_eq!(findings("crates/common/Cargo.toml", "").len(), 1);
    }
}
