//! CPython's own tests, from Debian's package, several modules in one process so that there is
//! something to page.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts, own, said, verdict_lines, version_of};

const PYTHON: &str = "/usr/bin/python3";

/// How many modules one process runs. Python collects its garbage between them, all of it: with many
/// more it would do little else than page.
const MODULES: usize = 8;

const PATIENCE: Duration = Duration::from_secs(900);

/// Modules whose results depend on more than the program, natively too, and why.
const LEFT_OUT: [(&str, &str); 0] = [];

/// Modules that take minutes, mostly of waiting. Each has a process of its own, after all others.
const SLOW: [&str; 20] = [
    "test___all__",
    "test_asyncio",
    "test_cmd_line_script",
    "test_compileall",
    "test_concurrent_futures",
    "test_cppext",
    "test_distutils",
    "test_ensurepip",
    "test_faulthandler",
    "test_gdb",
    "test_idle",
    "test_lib2to3",
    "test_multiprocessing_fork",
    "test_multiprocessing_forkserver",
    "test_multiprocessing_spawn",
    "test_peg_generator",
    "test_regrtest",
    "test_subprocess",
    "test_tools",
    "test_venv",
];

/// Half a minute's worth with much memory.
const SHORT: [&str; 4] = ["test_dict", "test_json", "test_ordered_dict", "test_fork1"];

pub(super) fn prepare(cache: &Cache, short: bool) -> anyhow::Result<Prepared> {
    cache.packages(&["python3"])?;
    let version = said(
        Command::new(PYTHON).args(["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]),
    )?;
    let version = version.trim();
    let package = format!("libpython{version}-testsuite");
    cache.packages(&[&package])?;
    let modules: Vec<String> =
        if short { SHORT.map(str::to_owned).to_vec() } else { all_modules(version)? };
    let (slow, quick): (Vec<String>, Vec<String>) =
        modules.iter().cloned().partition(|module| SLOW.contains(&module.as_str()));
    let cases = quick.chunks(MODULES).chain(slow.chunks(1)).map(case);
    let source = format!(
        "{} modules of CPython's `test` package ({package} {}), {MODULES} in a process",
        modules.len(),
        version_of(&package)?,
    );
    Ok((source, cases.collect()))
}

fn case(modules: &[String]) -> Case {
    let name = match modules {
        [first, .., last] => format!("{first} to {last}"),
        _ => modules.join(""),
    };
    let command = [PYTHON.to_owned(), own("python_modules.py"), "verdicts".to_owned()];
    Case::new(name, command.into_iter().chain(modules.iter().cloned()), PATIENCE, read)
}

fn all_modules(version: &str) -> anyhow::Result<Vec<String>> {
    let folder = format!("/usr/lib/python{version}/test");
    let mut modules = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let module = name.strip_suffix(".py").unwrap_or(&name);
        if module.starts_with("test_") && !module.contains('.') {
            modules.push(module.to_owned());
        }
    }
    modules.retain(|module| !LEFT_OUT.iter().any(|(left_out, _)| left_out == module));
    modules.sort();
    Ok(modules)
}

fn read(ended: &Ended) -> anyhow::Result<Verdicts> {
    verdict_lines(&ended.folder.join("verdicts"))
}
