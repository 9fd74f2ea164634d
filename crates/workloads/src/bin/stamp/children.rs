//! Forked children that check what their parent had at the instant of the fork, while the parent
//! goes on writing.

use std::io::{self, Write};

use anyhow::{Context, bail, ensure};
use farmem_workloads::content::Dice;
use farmem_workloads::{EXIT_WRONG_BYTE, PAGE_WORDS};

use super::span::{Span, WrongWord};

/// Children of one thread that run at a time: enough that snapshots overlap.
const CHILDREN_MAX: usize = 2;

/// Pages that a child checks, and then writes and checks again.
const PAGES_PER_CHILD: usize = 512;

/// The children of one thread.
#[derive(Default)]
pub(crate) struct Children {
    running: Vec<i32>,
}

impl Children {
    /// Forks a child that checks `span` as it is now; waits for an older one first when there are
    /// too many.
    pub(crate) fn fork(&mut self, span: &mut Span, mut dice: Dice) -> anyhow::Result<()> {
        while self.running.len() >= CHILDREN_MAX {
            self.reap_oldest()?;
        }
        // SAFETY: the child touches memory that it owns, writes to standard error with one raw
        // call and ends with _exit: no lock that another thread held at the fork is needed.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).context("fork"),
            0 => {
                let status = match check_snapshot(span, &mut dice) {
                    Ok(()) => 0,
                    Err(wrong) => {
                        complain(&wrong);
                        i32::from(EXIT_WRONG_BYTE)
                    }
                };
                // SAFETY: ends this process only.
                unsafe { libc::_exit(status) }
            }
            child => {
                self.running.push(child);
                Ok(())
            }
        }
    }

    /// Waits for all.
    pub(crate) fn reap_all(&mut self) -> anyhow::Result<()> {
        while !self.running.is_empty() {
            self.reap_oldest()?;
        }
        Ok(())
    }

    fn reap_oldest(&mut self) -> anyhow::Result<()> {
        let child = self.running.remove(0);
        let mut status = 0;
        loop {
            // SAFETY: the child is ours and not yet reaped; the status has room.
            match unsafe { libc::waitpid(child, &raw mut status, 0) } {
                -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                -1 => return Err(io::Error::last_os_error()).context("wait for a child"),
                _ => break,
            }
        }
        ensure!(libc::WIFEXITED(status), "a child was killed by signal {}", libc::WTERMSIG(status));
        match libc::WEXITSTATUS(status) {
            0 => Ok(()),
            status if status == i32::from(EXIT_WRONG_BYTE) => bail!(ChildSawWrongByte),
            status => bail!("a child ended with status {status}"),
        }
    }
}

/// A child found a wrong byte and said so on standard error.
#[derive(Debug)]
pub(crate) struct ChildSawWrongByte;

impl std::fmt::Display for ChildSawWrongByte {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("wrong byte: a forked child does not see what its parent had")
    }
}

impl std::error::Error for ChildSawWrongByte {}

fn check_snapshot(span: &mut Span, dice: &mut Dice) -> Result<(), WrongWord> {
    for _ in 0..PAGES_PER_CHILD {
        let page = dice.below(span.pages() as u64) as usize;
        span.check(page, dice.below(PAGE_WORDS as u64) as usize)?;
        span.write(page);
        let other = dice.below(span.pages() as u64) as usize;
        span.check(other, dice.below(PAGE_WORDS as u64) as usize)?;
    }
    Ok(())
}

/// Writes the complaint without allocating: after a fork of one thread among many the allocator's
/// lock may be held by nobody.
fn complain(wrong: &WrongWord) {
    let mut line = [0u8; 512];
    let mut rest = &mut line[..];
    let _ = writeln!(rest, "stamp: in a forked child: {wrong}");
    let length = 512 - rest.len();
    // SAFETY: the buffer holds at least `length` bytes. Nothing is left to do if it fails.
    unsafe { libc::write(2, line.as_ptr().cast(), length) };
}
