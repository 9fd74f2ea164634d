//! jemalloc's own tests, from Debian's source package: an allocator that maps, unmaps, and gives back
//! memory in ways of its own, and checks what it is given.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Cache, Case, Ended, Prepared, Verdicts, own};

const PATIENCE: Duration = Duration::from_secs(600);

/// Programs of tests that run one after the other in a case.
const PROGRAMS: usize = 12;

const BUILD: &str = "autoconf >autoconf.out 2>&1 && \
                     ./configure --enable-debug --enable-fill --disable-cxx >configure.out 2>&1 && \
                     make -j2 tests_unit tests_integration >make.out 2>&1";

pub(super) fn prepare(cache: &Cache) -> anyhow::Result<Prepared> {
    cache.packages(&["autoconf"])?;
    let tree = cache.source("jemalloc", BUILD)?;
    let mut programs = Vec::new();
    for kind in ["integration", "unit"] {
        let folder = tree.join("test").join(kind);
        let entries =
            fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        let names = entries.flatten().map(|entry| entry.path());
        // A program lies beside its source, which has a name that ends in .c.
        programs.extend(names.filter(|path| path.extension().is_none() && path.is_file()));
    }
    programs.sort();
    let cases = programs.chunks(PROGRAMS).map(|programs| {
        let name = |at: Option<&std::path::PathBuf>| {
            at.and_then(|path| path.file_name()).unwrap_or_default().display().to_string()
        };
        let name = format!("jemalloc: {} to {}", name(programs.first()), name(programs.last()));
        let paths = programs.iter().map(|path| path.display().to_string());
        let command = ["sh".to_owned(), own("jemalloc.sh")].into_iter().chain(paths);
        Case::new(name, command, PATIENCE, read)
    });
    let name = tree.file_name().unwrap_or_default().display();
    Ok((format!("tests of Debian's source {name}, with its checks"), cases.collect()))
}

/// `program: test (non-reentrant): pass`.
fn read(ended: &Ended) -> anyhow::Result<Verdicts> {
    let text = fs::read(&ended.outcome.output).context("read the output")?;
    let mut verdicts = Verdicts::new();
    for line in String::from_utf8_lossy(&text).lines() {
        if let Some((name, verdict)) = line.rsplit_once(": ")
            && (["pass", "skip", "fail"].contains(&verdict) || name.ends_with(": status"))
        {
            verdicts.insert(name.to_owned(), verdict.to_owned());
        }
    }
    Ok(verdicts)
}
