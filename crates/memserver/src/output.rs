//! Replies on their way to one peer.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use farmem_region::PAGE_SIZE;
use farmem_transport::{Connection, Moved, SLICES_MAX, recycle, skip_bytes};
use farmem_vmem::{Arena, Slot};

/// Bytes sent are dropped from the front of the heads when they are this many.
const SENT_HEADS_MAX: usize = 64 << 10;

/// Replies that wait to be sent: heads in one buffer, pages by a token for each slot, so that
/// they are sent from where they are stored and cannot change until they are.
#[derive(Debug, Default)]
pub(crate) struct Output {
    heads: Vec<u8>,
    /// Bytes at the front of `heads` that have been sent.
    heads_sent: usize,
    parts: VecDeque<Part>,
    /// Bytes of the first part that have been sent.
    first_sent: usize,
    queued: usize,
    /// Bytes sent since the connection began.
    sent: u64,
    slices: Vec<IoSlice<'static>>,
    /// Empty lists, kept for their memory.
    spare: Vec<Vec<Slot>>,
}

#[derive(Debug)]
enum Part {
    /// The next so many bytes of `heads`.
    Head(usize),
    Pages(Vec<Slot>),
}

impl Part {
    const fn bytes(&self) -> usize {
        match self {
            Self::Head(bytes) => *bytes,
            Self::Pages(slots) => slots.len() * PAGE_SIZE,
        }
    }
}

impl Output {
    /// Bytes that wait.
    pub(crate) const fn queued(&self) -> usize {
        self.queued
    }

    /// Bytes that are held for those that wait: pages go free when the last of those that are sent
    /// with them has gone.
    pub(crate) fn held(&self) -> usize {
        match self.parts.front() {
            Some(Part::Pages(_)) => self.queued + self.first_sent,
            Some(Part::Head(_)) | None => self.queued,
        }
    }

    /// Bytes that have been sent so far.
    pub(crate) const fn sent(&self) -> u64 {
        self.sent
    }

    /// Queues what `write` appends to the buffer that it is given, which ends at the position
    /// that it is given.
    pub(crate) fn push_head(&mut self, write: impl FnOnce(&mut Vec<u8>, usize)) {
        let start = self.heads.len();
        write(&mut self.heads, start);
        let bytes = self.heads.len() - start;
        if bytes == 0 {
            return;
        }
        self.queued += bytes;
        if let Some(Part::Head(before)) = self.parts.back_mut() {
            *before += bytes;
        } else {
            self.parts.push_back(Part::Head(bytes));
        }
    }

    /// Queues pages.
    pub(crate) fn push_pages(&mut self, slots: Vec<Slot>) {
        self.queued += slots.len() * PAGE_SIZE;
        self.parts.push_back(Part::Pages(slots));
    }

    /// An empty list for [`Output::push_pages`].
    pub(crate) fn spare_list(&mut self) -> Vec<Slot> {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes a list back.
    pub(crate) fn keep_list(&mut self, slots: Vec<Slot>) {
        debug_assert!(slots.is_empty());
        self.spare.push(slots);
    }

    /// Sends as much as goes; returns the bytes sent. `passed` rides on the first byte.
    pub(crate) fn flush(
        &mut self,
        connection: &mut dyn Connection,
        arena: &Arena,
        mut passed: Option<BorrowedFd<'_>>,
    ) -> io::Result<usize> {
        let mut total = 0;
        while self.queued > 0 {
            let mut slices = recycle(std::mem::take(&mut self.slices));
            self.gather(arena, &mut slices);
            let rest = skip_bytes(&mut slices, self.first_sent);
            let moved = match passed {
                Some(descriptor) => connection.send_with(rest, descriptor),
                None => connection.send(rest),
            };
            self.slices = recycle(slices);
            let Moved::Bytes(sent) = moved? else { break };
            passed = None;
            total += sent;
            self.note_sent(sent, arena);
        }
        Ok(total)
    }

    /// Gives all slots back.
    pub(crate) fn clear(&mut self, arena: &Arena) {
        for part in self.parts.drain(..) {
            if let Part::Pages(slots) = part {
                arena.release(slots);
            }
        }
        self.queued = 0;
    }

    fn gather<'a>(&'a self, arena: &'a Arena, slices: &mut Vec<IoSlice<'a>>) {
        let mut heads = &self.heads[self.heads_sent..];
        for part in &self.parts {
            match part {
                Part::Head(bytes) => {
                    let (head, rest) = heads.split_at(*bytes);
                    slices.push(IoSlice::new(head));
                    heads = rest;
                }
                Part::Pages(slots) => arena.gather(slots, slices),
            }
            if slices.len() >= SLICES_MAX {
                break;
            }
        }
    }

    fn note_sent(&mut self, bytes: usize, arena: &Arena) {
        self.queued -= bytes;
        self.sent += bytes as u64;
        self.first_sent += bytes;
        while let Some(part) = self.parts.front() {
            if self.first_sent < part.bytes() {
                break;
            }
            self.first_sent -= part.bytes();
            match self.parts.pop_front() {
                Some(Part::Head(bytes)) => self.heads_sent += bytes,
                Some(Part::Pages(mut slots)) => {
                    arena.release(slots.drain(..));
                    self.spare.push(slots);
                }
                None => {}
            }
        }
        if self.parts.is_empty() {
            self.heads.clear();
            self.heads_sent = 0;
        } else if self.heads_sent > SENT_HEADS_MAX {
            self.heads.drain(..self.heads_sent);
            self.heads_sent = 0;
        }
    }
}
