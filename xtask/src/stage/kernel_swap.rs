//! The kernel's own swap, for comparison: to compressed memory (zram) and to a file. Both exist
//! while the benchmark runs and are switched on for one run at a time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

const ZRAM_CONTROL: &str = "/sys/class/zram-control";

/// A place that the kernel may swap to, made by us and taken away with this value.
#[derive(Debug)]
pub(crate) enum SwapPlace {
    /// Compressed memory, by the compressor that the kernel chooses.
    Zram { number: u32, device: PathBuf },
    /// A file on a disk.
    File { file: PathBuf },
}

impl SwapPlace {
    /// Makes a zram device for `bytes` of uncompressed pages.
    pub(crate) fn zram(bytes: u64) -> anyhow::Result<Self> {
        let hot_add = Path::new(ZRAM_CONTROL).join("hot_add");
        let number = fs::read_to_string(&hot_add)
            .with_context(|| format!("read {} (needs root and zram)", hot_add.display()))?;
        let number: u32 = number.trim().parse().context("number of the zram device")?;
        let place = Self::Zram { number, device: format!("/dev/zram{number}").into() };
        let size = format!("/sys/block/zram{number}/disksize");
        fs::write(&size, bytes.to_string()).with_context(|| format!("write {size}"))?;
        succeed(Command::new("mkswap").arg(place.path()))?;
        Ok(place)
    }

    /// Makes a swap file of `bytes` in `folder`, which must lie on a disk.
    pub(crate) fn file(folder: &Path, bytes: u64) -> anyhow::Result<Self> {
        let file = folder.join(format!("farmem-xtask-{}.swap", std::process::id()));
        let place = Self::File { file };
        // A file with holes is refused by swapon, so it is written out.
        succeed(
            Command::new("dd")
                .args(["if=/dev/zero", "bs=1M", "status=none", "conv=fsync"])
                .arg(format!("count={}", bytes >> 20))
                .arg(format!("of={}", place.path().display())),
        )?;
        succeed(Command::new("chmod").arg("600").arg(place.path()))?;
        succeed(Command::new("mkswap").arg(place.path()))?;
        place.switch_on().map(drop).context("try whether it can be swapped to")?;
        Ok(place)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Zram { device, .. } => device,
            Self::File { file } => file,
        }
    }

    /// Lets the kernel swap to it until the returned value is dropped.
    pub(crate) fn switch_on(&self) -> anyhow::Result<SwitchedOn> {
        // Before any swap that the machine may have.
        succeed(Command::new("swapon").args(["--priority", "32767"]).arg(self.path()))?;
        Ok(SwitchedOn { path: self.path().to_owned() })
    }
}

impl Drop for SwapPlace {
    fn drop(&mut self) {
        let removed = match self {
            Self::Zram { number, .. } => {
                fs::write(Path::new(ZRAM_CONTROL).join("hot_remove"), number.to_string())
            }
            Self::File { file } => fs::remove_file(file),
        };
        if let Err(error) = removed {
            eprintln!("warning: {} could not be removed: {error}", self.path().display());
        }
    }
}

/// Swap that is on.
#[derive(Debug)]
pub(crate) struct SwitchedOn {
    path: PathBuf,
}

impl Drop for SwitchedOn {
    fn drop(&mut self) {
        if let Err(error) = succeed(Command::new("swapoff").arg(&self.path)) {
            eprintln!("warning: {error:#}");
        }
    }
}

/// Runs a command that prints nothing of interest when it succeeds.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", complaint.trim());
    Ok(())
}
