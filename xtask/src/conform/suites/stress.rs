//! stress-ng's stressors of virtual memory, which check what they have written.

use std::time::Duration;

use super::{Cache, Case, Ended, Prepared, Verdicts, version_of};

/// A stressor is told to end after its seconds; one that hangs is killed after this time.
const PATIENCE: Duration = Duration::from_secs(120);

/// How the `vm` stressor fills and checks its memory.
const METHODS: [&str; 33] = [
    "cache-lines",
    "cache-stripe",
    "checkerboard",
    "flip",
    "fwdrev",
    "galpat-0",
    "galpat-1",
    "gray",
    "grayflip",
    "rowhammer",
    "incdec",
    "inc-nybble",
    "lfsr32",
    "rand-set",
    "rand-sum",
    "read64",
    "ror",
    "swap",
    "move-inv",
    "modulo-x",
    "mscan",
    "prime-0",
    "prime-1",
    "prime-gray-0",
    "prime-gray-1",
    "prime-incdec",
    "walk-0d",
    "walk-1d",
    "walk-0a",
    "walk-1a",
    "write64",
    "write1024v",
    "zero-one",
];

/// The others of the class, each with the options that make it large enough. Those are left out that
/// grow until the machine has no memory left (bigheap, brk), or are about devices, files or swap.
const STRESSORS: [(&str, &[&str]); 23] = [
    ("bad-altstack", &[]),
    ("env", &[]),
    ("madvise", &[]),
    ("malloc", &["--malloc-bytes=64M", "--malloc-touch"]),
    ("mlock", &[]),
    ("mmap", &["--mmap-bytes=64M", "--mmap-mprotect"]),
    ("mmapaddr", &[]),
    ("mmapfixed", &[]),
    ("mmapfork", &[]),
    ("mmapmany", &[]),
    ("mprotect", &[]),
    ("mremap", &["--mremap-bytes=64M"]),
    ("munmap", &[]),
    ("pagemove", &["--pagemove-bytes=48M"]),
    ("pageswap", &[]),
    ("shm", &[]),
    ("stack", &["--stack-fill"]),
    ("stackmmap", &[]),
    ("userfaultfd", &["--userfaultfd-bytes=64M"]),
    ("vm-addr", &[]),
    ("vm-rw", &["--vm-rw-bytes=64M"]),
    ("vm-segv", &[]),
    ("vm-splice", &[]),
];

/// For every change.
const SHORT: [&str; 4] = ["flip", "galpat-1", "mremap", "malloc"];

pub(super) fn prepare(cache: &Cache, short: bool) -> anyhow::Result<Prepared> {
    cache.packages(&["stress-ng"])?;
    let seconds = if short { 2 } else { 4 };
    let methods = METHODS.map(|method| {
        let options = ["--vm-bytes=64M", "--vm-keep", "--vm-method"];
        case(&format!("vm {method}"), "vm", seconds, options.into_iter().chain([method]))
    });
    let others = STRESSORS
        .map(|(stressor, options)| case(stressor, stressor, seconds, options.iter().copied()));
    let mut cases: Vec<Case> = methods.into_iter().chain(others).collect();
    if short {
        cases.retain(|case| SHORT.iter().any(|name| case.name.ends_with(name)));
    }
    let source = format!(
        "{} stressors of memory of stress-ng {} with --verify, {seconds} s each",
        cases.len(),
        version_of("stress-ng")?,
    );
    Ok((source, cases))
}

fn case<'a>(
    name: &str,
    stressor: &str,
    seconds: u64,
    options: impl Iterator<Item = &'a str>,
) -> Case {
    let count = format!("--{stressor}=1");
    let time = format!("--timeout={seconds}");
    let command = ["stress-ng", "--verify", "--seed=7"].map(str::to_owned).into_iter();
    let options = options.map(str::to_owned);
    Case::new(name, command.chain([time, count]).chain(options), PATIENCE, read)
}

/// The status says it all: stress-ng fails if one of its checks has.
#[expect(clippy::unnecessary_wraps, reason = "as the others")]
fn read(_: &Ended) -> anyhow::Result<Verdicts> {
    Ok(Verdicts::new())
}
