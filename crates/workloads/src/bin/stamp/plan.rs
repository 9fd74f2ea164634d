//! What each thread does, in which order: decided by dice, so the same for the same seed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use farmem_workloads::PAGE_WORDS;
use farmem_workloads::content::Dice;

use super::Deed;
use super::children::Children;
use super::span::{CHUNK_PAGES, Memory, Pipe, Span};

/// The least chance of a deed is one in so many operations, so that plain loads and stores are
/// most of what happens, as in any program.
const OPERATIONS_PER_DEED: u64 = 64;

/// Forking and starting threads cost thousands of loads: one in so many deeds of that kind is done.
const DEEDS_PER_PROCESS: u64 = 64;

/// A thread owns two spans, and an owner is a byte of every stamp.
pub(crate) const THREADS_MAX: u8 = 127;

/// What all threads share.
pub(crate) struct Plan {
    pub(crate) deeds: Vec<Deed>,
    /// Memory of every thread that every other looks at.
    pub(crate) shared: Vec<Arc<Memory>>,
    /// Set by the first thread that fails.
    pub(crate) stop: AtomicBool,
    pub(crate) rounds: u64,
    pub(crate) until: Option<Instant>,
    pub(crate) seed: u64,
}

/// What one thread did.
pub(crate) struct Done {
    pub(crate) operations: u64,
    pub(crate) children_forked: u64,
    pub(crate) digest: u64,
}

impl Plan {
    /// Does what thread `owner` has to do; stops the others when it fails.
    pub(crate) fn carry_out(&self, owner: u8, open: Span) -> anyhow::Result<Done> {
        let result = self.operate(owner, open);
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    fn operate(&self, owner: u8, open: Span) -> anyhow::Result<Done> {
        let own = Span::map(owner + THREADS_MAX, open.chunks()).context("map the memory")?;
        let mut stamper = Stamper {
            dice: Dice::new(self.seed ^ u64::from(owner) << 32),
            onlooker: Dice::new(!self.seed ^ u64::from(owner) << 32),
            own,
            open,
            pipe: Pipe::new().context("make a pipe")?,
            children: Children::default(),
            children_forked: 0,
        };
        let mut operations = 0;
        while operations < self.rounds && !self.stop.load(Ordering::Relaxed) {
            if self.until.is_some_and(|until| Instant::now() >= until) {
                break;
            }
            stamper.load_and_store()?;
            let other = stamper.onlooker.below(self.shared.len() as u64) as usize;
            self.shared[other].look(&mut stamper.onlooker)?;
            if !self.deeds.is_empty() && stamper.dice.below(OPERATIONS_PER_DEED) == 0 {
                let deed = self.deeds[stamper.dice.below(self.deeds.len() as u64) as usize];
                stamper.do_deed(deed)?;
            }
            operations += 1;
        }
        stamper.children.reap_all()?;
        stamper.check_everything()?;
        let digest = stamper.own.digest() ^ stamper.open.digest().rotate_left(32);
        Ok(Done { operations, children_forked: stamper.children_forked, digest })
    }
}

/// One thread's memory and tools.
struct Stamper {
    dice: Dice,
    /// For looking at others' memory, apart from `dice` so that what this thread does to its own
    /// never depends on how many others there are.
    onlooker: Dice,
    own: Span,
    open: Span,
    pipe: Pipe,
    children: Children,
    children_forked: u64,
}

impl Stamper {
    fn load_and_store(&mut self) -> anyhow::Result<()> {
        let page = self.dice.below(self.own.pages() as u64) as usize;
        let blank = self.dice.below(PAGE_WORDS as u64) as usize;
        let span = if self.dice.below(2) == 0 { &mut self.own } else { &mut self.open };
        span.check(page, blank)?;
        if self.dice.below(2) == 0 {
            span.write(page);
        }
        Ok(())
    }

    fn do_deed(&mut self, deed: Deed) -> anyhow::Result<()> {
        let chunk = self.dice.below(self.own.chunks() as u64) as usize;
        let offset = self.dice.below(CHUNK_PAGES as u64) as usize;
        let pages = 1 + self.dice.below((CHUNK_PAGES - offset) as u64) as usize;
        let page = chunk * CHUNK_PAGES + offset;
        match deed {
            Deed::Mremap => self.own.move_chunk(chunk).context("mremap")?,
            Deed::Dontneed => self.own.give_back(page, pages).context("madvise(MADV_DONTNEED)")?,
            Deed::Free => self.own.free_lazily(page, pages).context("madvise(MADV_FREE)")?,
            Deed::Unmap => self.own.replace_chunk(chunk).context("munmap and mmap")?,
            Deed::Protect => {
                self.own.allow_writing(chunk, false).context("mprotect(PROT_READ)")?;
                self.own.check(page, offset)?;
                self.own.allow_writing(chunk, true).context("mprotect(PROT_WRITE)")?;
                self.own.write(page);
            }
            Deed::Fork if self.dice.below(DEEDS_PER_PROCESS) == 0 => {
                self.children_forked += 1;
                self.children.fork(&mut self.own, self.dice.clone())?;
            }
            Deed::Threads if self.dice.below(DEEDS_PER_PROCESS) == 0 => {
                self.look_from_a_thread()?;
            }
            Deed::Syscalls => {
                let to = self.dice.below(self.own.pages() as u64) as usize;
                if to != page {
                    self.own.send_through(&self.pipe, page, to)?;
                }
            }
            Deed::Fork | Deed::Threads | Deed::All | Deed::Signals => {}
        }
        // Whatever was done, the page holds what it must now.
        self.own.check(page, offset)?;
        Ok(())
    }

    /// Starts a thread that checks a few pages, with a stack and a heap of its own, and joins it:
    /// the kernel clears a word in the thread's memory as it ends, for which the join waits.
    fn look_from_a_thread(&mut self) -> anyhow::Result<()> {
        const PAGES: usize = 16;
        let pages: Vec<_> =
            (0..PAGES).map(|_| self.dice.below(self.own.pages() as u64) as usize).collect();
        let own = &self.own;
        std::thread::scope(|scope| {
            let look =
                move || pages.iter().try_for_each(|page| own.check(*page, page % PAGE_WORDS));
            scope.spawn(look).join().expect("no panic")
        })?;
        Ok(())
    }

    fn check_everything(&self) -> anyhow::Result<()> {
        for span in [&self.own, &self.open] {
            (0..span.pages()).try_for_each(|page| span.check(page, page % PAGE_WORDS))?;
        }
        Ok(())
    }
}
