//! A connection that is up: messages out, replies in.
//!
//! Pages are received straight into their frames. Where a reply's pages lie in the stream is
//! known only after its head, so one call receives both by a guess: the next reply answers the
//! oldest request.
//!
//! ```text
//! guess:    [ header | entries of the oldest read ][ its frames ............ ]
//! arrived:  [ header | entries ][ pages ......................... ]   right: nothing to move
//! arrived:  [ header ][ header | entries ][ pages ............... ]   wrong: what follows the
//!                                                        first header moves to the spill
//! ```

use std::io::{self, IoSlice, IoSliceMut};

use farmem_region::{Frames, Nanos, PAGE_SIZE, RegionId};
use farmem_transport::{Connection, Moved, SLICES_MAX, recycle, recycle_mut, skip_bytes};
use farmem_wire::{
    BODY_BYTES_MAX, DecodeError, HEAD_BYTES_MAX, HEADER_BYTES, Header, PageEntry, Payload,
    verify_body,
};

use crate::messages::{MessageIndex, Messages};
use crate::shared::SharedArena;

/// How often a socket is looked at from which nothing is expected: a look costs a system call.
const IDLE_LOOK_NANOS: u64 = 1_000_000;
/// Bytes gathered for one call: more would only be copied by the kernel in several steps.
const SEND_BYTES_MAX: usize = 1 << 20;

/// Why a connection is of no use any more.
#[derive(Debug)]
pub(crate) enum LinkError {
    Io(io::Error),
    Closed,
    Silent,
    /// What came is not what the protocol allows.
    Violation(String),
}

impl std::fmt::Display for LinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the connection broke ({error})"),
            Self::Closed => f.write_str("it closed the connection"),
            Self::Silent => f.write_str("it went silent"),
            Self::Violation(what) => write!(f, "it broke the protocol: {what}"),
        }
    }
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<DecodeError> for LinkError {
    fn from(error: DecodeError) -> Self {
        Self::Violation(error.to_string())
    }
}

/// A reply that is complete. Its entries and body are in the link until the next one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrived {
    pub(crate) message: MessageIndex,
    pub(crate) header: Header,
}

/// A connection that is up.
#[derive(Debug)]
pub(crate) struct Link {
    connection: Box<dyn Connection>,
    /// Bytes of the first unsent message that have been sent.
    out_sent: usize,
    /// Whether the socket took no more.
    pub(crate) is_blocked: bool,
    /// The reply that is coming in: its header, entries and body.
    head: Box<[u8; HEAD_BYTES_MAX + BODY_BYTES_MAX]>,
    head_received: usize,
    /// The header, once it is there, and the message that it answers.
    known: Option<(Header, MessageIndex)>,
    /// Bytes received into the frames of the message.
    pages_received: usize,
    /// Bytes that came by a wrong guess and are to be looked at before any others.
    spill: Vec<u8>,
    spill_read: usize,
    /// Whether the socket was seen to be empty.
    drained: bool,
    /// When the socket was last looked at.
    last_look: Nanos,
    pub(crate) last_heard: Nanos,
    slices: Vec<IoSlice<'static>>,
    slices_mut: Vec<IoSliceMut<'static>>,
}

impl Link {
    pub(crate) fn new(connection: Box<dyn Connection>, now: Nanos) -> Self {
        Self {
            connection,
            out_sent: 0,
            is_blocked: false,
            head: Box::new([0; HEAD_BYTES_MAX + BODY_BYTES_MAX]),
            head_received: 0,
            known: None,
            pages_received: 0,
            spill: Vec::new(),
            spill_read: 0,
            drained: false,
            last_look: now,
            last_heard: now,
            slices: Vec::new(),
            slices_mut: Vec::new(),
        }
    }

    pub(crate) fn connection(&self) -> &dyn Connection {
        &*self.connection
    }

    /// Sends as much as goes.
    pub(crate) fn send(
        &mut self,
        messages: &mut Messages,
        mut arena: Option<&mut SharedArena>,
        region: RegionId,
        frames: &dyn Frames,
        now: Nanos,
    ) -> Result<(), LinkError> {
        if messages.sent.is_empty() && self.out_sent == 0 {
            // Nothing is owed to us yet: the time that counts begins now.
            self.last_heard = now;
        }
        (self.is_blocked, messages.has_new) = (false, false);
        while !messages.unsent.is_empty() {
            let mut slices = recycle(std::mem::take(&mut self.slices));
            let ready = seal_first(messages, arena.as_deref_mut(), region, frames);
            gather(messages, ready, frames, &mut slices);
            if slices.is_empty() {
                self.slices = recycle(slices);
                break;
            }
            let moved = self.connection.send(skip_bytes(&mut slices, self.out_sent));
            self.slices = recycle(slices);
            let Moved::Bytes(sent) = moved? else {
                self.is_blocked = true;
                break;
            };
            self.out_sent += sent;
            while let Some(first) = messages.unsent.front() {
                let bytes = messages.get(*first).bytes();
                if self.out_sent < bytes {
                    break;
                }
                self.out_sent -= bytes;
                messages.mark_sent(now);
            }
            messages.first_begun = self.out_sent > 0;
        }
        Ok(())
    }

    /// How long nothing has been heard though something is owed to us.
    pub(crate) fn silent_us(&self, messages: &Messages, now: Nanos) -> u64 {
        let owed = !messages.sent.is_empty() || self.out_sent > 0;
        if owed { now.since(self.last_heard) / 1_000 } else { 0 }
    }

    /// The socket may have something again. While nothing is owed to us that can only be its end,
    /// which is soon enough found a little later: pages read from the shared arena need no look.
    pub(crate) fn look_again(&mut self, messages: &Messages, now: Nanos) {
        if self.is_owed(messages) || now.since(self.last_look) >= IDLE_LOOK_NANOS {
            self.drained = false;
            self.last_look = now;
        }
    }

    /// Whether a reply is to come, or has come in part.
    fn is_owed(&self, messages: &Messages) -> bool {
        !messages.sent.is_empty() || self.known.is_some() || self.head_received > 0
    }

    /// The next reply that is complete, if there is one.
    pub(crate) fn receive(
        &mut self,
        messages: &Messages,
        frames: &mut dyn Frames,
        now: Nanos,
    ) -> Result<Option<Arrived>, LinkError> {
        loop {
            if let Some(arrived) = self.take_complete()? {
                // Who asked for one thing and has it is owed nothing more: no look for what is not there.
                self.drained |= messages.sent.len() <= 1 && self.spill_read == self.spill.len();
                return Ok(Some(arrived));
            }
            if !self.take_spill(messages, frames)? {
                // What nobody asked for is not looked for: see `look_again`.
                let owed = self.is_owed(messages) || now == self.last_look;
                if self.drained || !owed || !self.take_socket(messages, frames)? {
                    return Ok(None);
                }
                self.last_heard = now;
            }
        }
    }

    /// The entries of the reply that arrived last.
    pub(crate) fn entries(&self, header: &Header) -> impl ExactSizeIterator<Item = PageEntry> + '_ {
        PageEntry::decode_all(&self.head[HEADER_BYTES..HEADER_BYTES + header.entry_bytes()])
    }

    /// The body of the reply that arrived last.
    pub(crate) fn body(&self, header: &Header) -> &[u8] {
        let start = HEADER_BYTES + header.entry_bytes();
        &self.head[start..start + header.payload_bytes()]
    }

    fn take_complete(&mut self) -> Result<Option<Arrived>, LinkError> {
        let Some((header, message)) = self.known else {
            return Ok(None);
        };
        let is_whole = match header.payload_kind() {
            Payload::Pages => self.pages_received == header.payload_bytes(),
            Payload::Body | Payload::Parts => true,
        };
        let head_bytes = HEADER_BYTES + header.covered_bytes();
        if self.head_received < head_bytes || !is_whole {
            return Ok(None);
        }
        verify_body(&header, &self.head[HEADER_BYTES..head_bytes])?;
        (self.known, self.head_received, self.pages_received) = (None, 0, 0);
        Ok(Some(Arrived { message, header }))
    }

    /// Moves what came by a wrong guess to where it belongs; returns whether there was anything.
    fn take_spill(
        &mut self,
        messages: &Messages,
        frames: &mut dyn Frames,
    ) -> Result<bool, LinkError> {
        let rest = &self.spill[self.spill_read..];
        if rest.is_empty() {
            return Ok(false);
        }
        let head_end = match &self.known {
            None => HEADER_BYTES,
            Some((header, _)) => HEADER_BYTES + header.covered_bytes(),
        };
        let taken = rest.len().min(head_end - self.head_received);
        self.head[self.head_received..self.head_received + taken].copy_from_slice(&rest[..taken]);
        self.head_received += taken;
        self.spill_read += taken;
        if let Some((header, message)) = self.known
            && header.payload_kind() == Payload::Pages
        {
            self.spill_to_frames(messages, message, frames);
        }
        if self.spill_read == self.spill.len() {
            self.spill.clear();
            self.spill_read = 0;
        }
        self.learn(messages)?;
        Ok(true)
    }

    fn spill_to_frames(
        &mut self,
        messages: &Messages,
        message: MessageIndex,
        frames: &mut dyn Frames,
    ) {
        let ids = &messages.get(message).frames;
        while let Some(frame) = ids.get(self.pages_received / PAGE_SIZE) {
            let rest = &self.spill[self.spill_read..];
            let room = &mut frames.bytes_mut(*frame)[self.pages_received % PAGE_SIZE..];
            let bytes = room.len().min(rest.len());
            if bytes == 0 {
                return;
            }
            room[..bytes].copy_from_slice(&rest[..bytes]);
            self.spill_read += bytes;
            self.pages_received += bytes;
        }
    }

    /// Receives once, by a guess if the header is not there yet; returns whether anything came.
    fn take_socket(
        &mut self,
        messages: &Messages,
        frames: &mut dyn Frames,
    ) -> Result<bool, LinkError> {
        let (guess, head_end) = match &self.known {
            Some((header, message)) => (Some(*message), HEADER_BYTES + header.covered_bytes()),
            None => {
                let first = messages.sent.front().copied();
                let bytes = first.map(|first| messages.get(first).reply_head_bytes());
                (first, bytes.unwrap_or(HEADER_BYTES))
            }
        };
        let has_pages = |message: &MessageIndex| match &self.known {
            Some((header, _)) => header.payload_kind() == Payload::Pages,
            None => messages.get(*message).receives_pages(),
        };
        let pages_of = guess.filter(has_pages);
        let mut slices = recycle_mut(std::mem::take(&mut self.slices_mut));
        if self.head_received < head_end {
            slices.push(IoSliceMut::new(&mut self.head[self.head_received..head_end]));
        }
        let mut room = head_end - self.head_received;
        if let Some(message) = pages_of {
            let ids = &messages.get(message).frames;
            let first = self.pages_received / PAGE_SIZE;
            let before = slices.len();
            frames.gather_mut(&ids[first..], &mut slices);
            // Within the first page, if it is there in part.
            skip_within(&mut slices[before..], self.pages_received % PAGE_SIZE);
            room += ids.len() * PAGE_SIZE - self.pages_received;
        }
        let moved = self.connection.receive(&mut slices);
        self.slices_mut = recycle_mut(slices);
        let bytes = match moved? {
            Moved::Bytes(bytes) => bytes,
            Moved::WouldBlock => return Ok(false),
            Moved::Closed => return Err(LinkError::Closed),
        };
        self.drained = bytes < room;
        let in_head = bytes.min(head_end - self.head_received);
        self.head_received += in_head;
        self.pages_received += bytes - in_head;
        if self.learn(messages)? {
            self.check_guess(messages, guess, frames);
        }
        Ok(true)
    }

    /// Reads the header if it has just become complete; returns whether it has.
    fn learn(&mut self, messages: &Messages) -> Result<bool, LinkError> {
        if self.known.is_some() || self.head_received < HEADER_BYTES {
            return Ok(false);
        }
        let header = Header::decode(self.head.first_chunk().expect("the head is longer"))?;
        let violation = |what: &str| Err(LinkError::Violation(what.to_owned()));
        if !header.reply {
            return violation("it sent a request");
        }
        let Some(message) = messages.find(header.request) else {
            return violation("it answered a request that was never made");
        };
        let asked = messages.get(message);
        if asked.header.action != header.action {
            return violation("it answered another action than it was asked for");
        }
        if header.payload_kind() == Payload::Pages && header.entries != asked.header.entries {
            return violation("it sent another number of pages than it was asked for");
        }
        self.known = Some((header, message));
        Ok(true)
    }

    /// If the guess by which bytes were received was wrong, moves those behind the header to the
    /// spill. A body that is as long as guessed is where it belongs.
    fn check_guess(
        &mut self,
        messages: &Messages,
        guess: Option<MessageIndex>,
        frames: &dyn Frames,
    ) {
        let Some((header, message)) = self.known else {
            return;
        };
        let head_bytes = HEADER_BYTES + header.covered_bytes();
        let fits = match header.payload_kind() {
            Payload::Pages => guess == Some(message),
            Payload::Body | Payload::Parts => {
                self.head_received <= head_bytes && self.pages_received == 0
            }
        };
        if fits {
            return;
        }
        self.spill.extend_from_slice(&self.head[HEADER_BYTES..self.head_received]);
        self.head_received = HEADER_BYTES;
        let mut left = std::mem::take(&mut self.pages_received);
        if let Some(guess) = guess {
            for frame in &messages.get(guess).frames {
                let bytes = left.min(PAGE_SIZE);
                self.spill.extend_from_slice(&frames.bytes(*frame)[..bytes]);
                left -= bytes;
            }
        }
    }
}

/// Completes the first messages to be sent; returns how many are ready to go in one call.
fn seal_first(
    messages: &mut Messages,
    mut arena: Option<&mut SharedArena>,
    region: RegionId,
    frames: &dyn Frames,
) -> usize {
    let (mut bytes, mut pages, mut count) = (0, 0, 0);
    while let Some(index) = messages.unsent.get(count).copied() {
        let is_begun = count == 0 && messages.first_begun;
        let waits = || {
            messages.get(index).placing
                || !messages.has_window(index, pages)
                || messages.must_wait(count)
        };
        if !is_begun && waits() {
            break;
        }
        if !messages.get(index).sealed
            && !seal_write(messages, index, arena.as_deref_mut(), region, frames)
        {
            break;
        }
        bytes += messages.get(index).bytes();
        pages += messages.get(index).page_bytes();
        count += 1;
        if bytes >= SEND_BYTES_MAX || count >= SLICES_MAX / 2 {
            break;
        }
    }
    count
}

/// Completes a write, or makes a commit of it; returns false if it has to wait for fresh slots.
fn seal_write(
    messages: &mut Messages,
    index: MessageIndex,
    arena: Option<&mut SharedArena>,
    region: RegionId,
    frames: &dyn Frames,
) -> bool {
    if let Some(arena) = arena.filter(|_| !messages.get(index).needs_write) {
        if arena.place(messages.get_mut(index), region, frames) {
            messages.get_mut(index).sealed = true;
            return true;
        }
        if arena.is_usable() && messages.awaits_slots(index) {
            return false;
        }
    }
    messages.get_mut(index).seal_write(region, frames);
    true
}

/// The buffers of the first `count` messages to be sent.
fn gather<'a>(
    messages: &'a Messages,
    count: usize,
    frames: &'a dyn Frames,
    slices: &mut Vec<IoSlice<'a>>,
) {
    for index in messages.unsent.iter().take(count) {
        let message = messages.get(*index);
        slices.push(IoSlice::new(&message.head));
        if message.sends_pages() {
            frames.gather(&message.frames, slices);
        }
    }
}

/// Drops the first bytes of the first buffer.
fn skip_within(slices: &mut [IoSliceMut<'_>], bytes: usize) {
    if let Some(first) = slices.first_mut() {
        first.advance(bytes);
    }
}
