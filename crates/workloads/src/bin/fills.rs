//! Fills memory as fast as it can, three words a page, and looks at all of them.

use anyhow::ensure;
use clap::Parser;
use farmem_workloads::PAGE_WORDS;

#[derive(Parser)]
struct Arguments {
    /// Memory that is filled.
    #[arg(long, default_value_t = 96)]
    mebibytes: usize,
}

fn main() -> anyhow::Result<()> {
    let pages = Arguments::parse().mebibytes << 8;
    let mut words = vec![0_u64; pages * PAGE_WORDS];
    let three = |page: usize| [page as u64 + 1, !(page as u64), page as u64 ^ 0x5555];
    for (page, words) in words.chunks_exact_mut(PAGE_WORDS).enumerate() {
        [words[0], words[PAGE_WORDS / 2], words[PAGE_WORDS - 1]] = three(page);
    }
    for (page, words) in words.chunks_exact(PAGE_WORDS).enumerate() {
        let found = [words[0], words[PAGE_WORDS / 2], words[PAGE_WORDS - 1]];
        ensure!(found == three(page), "page {page} has {found:x?}");
    }
    Ok(())
}
