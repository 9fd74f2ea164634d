//! What the kernel itself does with the program's pages meanwhile: swap, and merging of equal pages.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::rig::{LIMIT, Rig};

/// Swap to compressed memory, switched on for as long as the value lives.
struct Zram {
    number: String,
}

impl Zram {
    /// Nothing where the kernel has none, or we may not.
    fn on() -> Option<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").ok()?.trim().to_owned();
        let zram = Self { number };
        fs::write(format!("/sys/block/zram{}/disksize", zram.number), "256M").ok()?;
        let done = |program: &str| {
            let output = Command::new(program).arg(zram.device()).output();
            output.is_ok_and(|output| output.status.success())
        };
        (done("mkswap") && done("swapon")).then_some(zram)
    }

    fn device(&self) -> String {
        format!("/dev/zram{}", self.number)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(self.device()).output();
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

const KSM: &str = "/sys/kernel/mm/ksm";

/// Merging of equal pages at full speed, for as long as the value lives.
struct Merging {
    before: Vec<(&'static str, String)>,
}

impl Merging {
    fn on() -> Self {
        let set = |(name, value): (&'static str, &str)| {
            let path = Path::new(KSM).join(name);
            let before = fs::read_to_string(&path).ok()?;
            fs::write(&path, value).ok()?;
            Some((name, before.trim().to_owned()))
        };
        let wanted = [("pages_to_scan", "5000"), ("sleep_millisecs", "5"), ("run", "1")];
        Self { before: wanted.into_iter().filter_map(set).collect() }
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        for (name, before) in self.before.iter().rev() {
            let _ = fs::write(Path::new(KSM).join(name), before);
        }
    }
}

/// R1: what the kernel swaps out or merges by itself is not missing, and keeps its content. Where
/// there is neither swap nor merging the program does the same without.
#[test]
fn u27_pages_that_the_kernel_swaps_or_merges_keep_their_content() {
    let Some(rig) = Rig::new() else { return };
    let (_zram, _merging) = (Zram::on(), Merging::on());
    rig.run(&["--local", LIMIT], &rig.compile("merged_and_swapped"), &[]).is_right();
}
