//! Requests as they go over the connection, and the operations of the caller that they belong to.

use std::collections::VecDeque;

use farmem_region::{
    FrameId, Frames, Nanos, Outcome, PageIndex, PageRange, RegionId, StoreError, Ticket, Version,
};
use farmem_wire::{
    Action, AskMap, Free, HEADER_BYTES, Header, Malloc, PAGE_ENTRY_BYTES, PAGES_PER_MESSAGE_MAX,
    PageEntry, RangeEntry, SLOTS_ASSIGNED_MAX, Slots, page_checksum, seal,
};

use crate::config::SessionInfo;

/// Messages that may wait for their replies. Four times what fills a fast network's pipe at one
/// page a message; beyond it, submitting says "busy".
pub(crate) const MESSAGES_MAX: usize = 1024;

/// Pages of a message that carries more than one. Four of them are as fast as one of four times
/// the size, and what is urgent waits for one only.
pub(crate) const MESSAGE_PAGES: usize = 64;
const _: () = assert!(MESSAGE_PAGES <= PAGES_PER_MESSAGE_MAX);

/// Bytes of pages that may be sent and not acknowledged. Enough for a network of 10 Gbit/s and
/// 800 us; more would only wait in the kernel, in front of the next read.
const PAGES_SENT_BYTES_MAX: usize = 1 << 20;

/// Bits of a request id that name the message's place in the list.
const INDEX_BITS: u32 = 16;

/// Place in the list of messages.
pub(crate) type MessageIndex = usize;
/// Place in the list of operations.
pub(crate) type OperationIndex = usize;

/// A page as it was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) page: PageIndex,
    pub(crate) version: Version,
}

/// One request. Vacant ones are kept for their buffers.
#[derive(Debug)]
pub(crate) struct Message {
    /// The id on the wire; 0 while vacant.
    pub(crate) request: u64,
    pub(crate) header: Header,
    /// The operation that it is part of; a ping is part of none.
    pub(crate) operation: Option<OperationIndex>,
    /// Header, entries and body, as they are sent.
    pub(crate) head: Vec<u8>,
    pub(crate) wanted: Vec<Wanted>,
    pub(crate) frames: Vec<FrameId>,
    /// Whether `head` is complete: a write's checksums are computed when it is first sent.
    pub(crate) sealed: bool,
    /// Whether it is among those that were sent and wait for a reply.
    is_sent: bool,
    /// When the last of it was sent, or earlier.
    pub(crate) sent_at: Nanos,
    /// Whether it was sent before: the first sending may have had its effect.
    pub(crate) resent: bool,
    /// Whether it is a read that has not been tried without the server.
    pub(crate) untried: bool,
    /// Whether it is a read that no thread waits for.
    pub(crate) ahead: bool,
    /// Whether it is a commit whose pages another thread copies: it waits, and what follows it.
    pub(crate) placing: bool,
    /// Whether it is a write that must not become a commit.
    pub(crate) needs_write: bool,
    /// How often its pages arrived damaged, there or here.
    pub(crate) damaged: u32,
    /// When the server first refused it for what passes, and for how long it is repeated then.
    pub(crate) put_off: Option<(Nanos, u64)>,
}

impl Message {
    /// Bytes that are sent: the pages too, if it is a write.
    pub(crate) fn bytes(&self) -> usize {
        self.head.len() + self.page_bytes()
    }

    /// Bytes of the pages that are sent.
    pub(crate) fn page_bytes(&self) -> usize {
        if self.sends_pages() { self.header.payload_bytes() } else { 0 }
    }

    pub(crate) fn sends_pages(&self) -> bool {
        self.header.action == Action::Write
    }

    /// Bytes of header, entries and body of the reply that grants it. Only a guess: the reply's
    /// own header decides.
    pub(crate) fn reply_head_bytes(&self) -> usize {
        HEADER_BYTES
            + match self.header.action {
                Action::Read => self.wanted.len() * PAGE_ENTRY_BYTES,
                Action::Commit => self.wanted.len() * size_of::<u32>(),
                _ => 0,
            }
    }

    /// Completes a read's head.
    pub(crate) fn seal_read(&mut self) {
        self.header.entries = u32::try_from(self.wanted.len()).expect("at most a message's pages");
        self.head.truncate(HEADER_BYTES);
        for Wanted { page, version } in &self.wanted {
            let entry = PageEntry { page: *page, version: *version, ..PageEntry::default() };
            entry.encode(&mut self.head);
        }
        self.finish();
    }

    /// The entries of a message that is sealed.
    pub(crate) fn entries(&self) -> impl ExactSizeIterator<Item = PageEntry> + '_ {
        let end = HEADER_BYTES + self.header.entry_bytes();
        PageEntry::decode_all(&self.head[HEADER_BYTES..end])
    }

    /// Whether it is a free of a page that `other` writes.
    fn frees_what_is_written(&self, other: &Self) -> bool {
        if self.header.action != Action::Free
            || !matches!(other.header.action, Action::Write | Action::Commit)
        {
            return false;
        }
        let pages = other.wanted.iter().map(|wanted| wanted.page);
        let Some((first, last)) = pages.clone().min().zip(pages.clone().max()) else {
            return false;
        };
        let end = HEADER_BYTES + self.header.entry_bytes();
        RangeEntry::decode_all(&self.head[HEADER_BYTES..end]).any(|RangeEntry(range)| {
            let PageRange { start, count } = range;
            let has = |page: PageIndex| {
                page.get().checked_sub(start.get()).is_some_and(|at| at < count.get())
            };
            // Most messages are about pages elsewhere: no look at each of them.
            let may_have = start <= last && (start >= first || has(first));
            may_have && pages.clone().any(has)
        })
    }

    /// Whether it is a write that nothing was done for yet, and that may become a commit.
    pub(crate) fn may_be_placed(&self) -> bool {
        self.header.action == Action::Write && !self.sealed && !self.needs_write
    }

    /// Makes a commit of a write whose pages lie in the slots that the entries name.
    pub(crate) fn become_commit(&mut self, entries: &[u8]) {
        self.head.truncate(HEADER_BYTES);
        self.head.extend_from_slice(entries);
        self.header.action = Action::Commit;
        self.header.payload = 0;
        seal(self.header, &mut self.head);
    }

    /// A commit that was refused is to go as a write, with its pages.
    pub(crate) fn unplace(&mut self) {
        self.header.action = Action::Write;
        self.header.payload = self.header.entries * farmem_region::PAGE_SIZE as u32;
        self.sealed = false;
        self.needs_write = true;
    }

    /// Whether a reply that grants it carries pages.
    pub(crate) fn receives_pages(&self) -> bool {
        self.header.action == Action::Read
    }

    /// Computes a write's checksums and completes its head.
    pub(crate) fn seal_write(&mut self, region: RegionId, frames: &dyn Frames) {
        self.sealed = true;
        self.head.truncate(HEADER_BYTES);
        for (wanted, frame) in self.wanted.iter().zip(&self.frames) {
            let Wanted { page, version } = *wanted;
            let checksum = page_checksum(region, page, version, frames.bytes(*frame));
            PageEntry { page, version, checksum, slot: 0 }.encode(&mut self.head);
        }
        seal(self.header, &mut self.head);
    }
}

/// What a caller asked for: it ends when all its messages have.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) ticket: Ticket,
    pub(crate) messages_left: usize,
    /// What it ends with unless `error` is set.
    pub(crate) outcome: Outcome,
    pub(crate) error: Option<StoreError>,
}

/// All requests that have no reply yet.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    list: Vec<Message>,
    vacant: Vec<MessageIndex>,
    next: u64,
    /// To be sent, in this order. Of the first one a part may have been sent.
    pub(crate) unsent: VecDeque<MessageIndex>,
    /// Sent, in this order.
    pub(crate) sent: VecDeque<MessageIndex>,
    /// Whether a part of the first unsent message has been sent.
    pub(crate) first_begun: bool,
    /// Whether something was added since it was last tried to send.
    pub(crate) has_new: bool,
    /// Bytes of pages in messages that were sent.
    pages_sent: usize,
    /// To be sent again later, in this order.
    pub(crate) delayed: VecDeque<(Nanos, MessageIndex)>,
    /// Whether a free may be refused as busy, and so come after what was sent after it: in a region with a
    /// name. Then a write waits for the frees of its pages before it.
    pub(crate) frees_come_late: bool,
}

impl Messages {
    /// Messages that may be added before the limit.
    pub(crate) fn room(&self) -> usize {
        MESSAGES_MAX.saturating_sub(self.in_use())
    }

    /// Messages without a reply.
    pub(crate) fn in_use(&self) -> usize {
        self.list.len() - self.vacant.len()
    }

    pub(crate) fn get(&self, index: MessageIndex) -> &Message {
        &self.list[index]
    }

    pub(crate) fn get_mut(&mut self, index: MessageIndex) -> &mut Message {
        &mut self.list[index]
    }

    /// The message that a reply answers, if one waits for it.
    pub(crate) fn find(&self, request: u64) -> Option<MessageIndex> {
        let index = usize::try_from(request & ((1 << INDEX_BITS) - 1)).ok()?;
        let message = self.list.get(index)?;
        (message.is_sent && message.request == request).then_some(index)
    }

    /// Adds a message to the end of those to be sent; the caller completes it.
    fn add(
        &mut self,
        session: &SessionInfo,
        action: Action,
        operation: Option<OperationIndex>,
    ) -> &mut Message {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.list.push(Message::vacant());
            self.list.len() - 1
        });
        self.next += 1;
        self.has_new = true;
        self.unsent.push_back(index);
        let message = &mut self.list[index];
        message.request = (self.next << INDEX_BITS) | index as u64;
        message.header = session.header(action, message.request);
        message.operation = operation;
        message.head.clear();
        message.head.resize(HEADER_BYTES, 0);
        message
    }

    /// Adds a read or a write of pages; of a read it is told whether it is `ahead` of need.
    pub(crate) fn add_pages(
        &mut self,
        session: &SessionInfo,
        (action, ahead): (Action, bool),
        operation: OperationIndex,
        pages: impl ExactSizeIterator<Item = (Wanted, FrameId)>,
    ) {
        let count = u32::try_from(pages.len()).expect("at most PAGES_PER_MESSAGE_MAX");
        let message = self.add(session, action, Some(operation));
        message.header.entries = count;
        for (wanted, frame) in pages {
            message.wanted.push(wanted);
            message.frames.push(frame);
        }
        if action == Action::Write {
            message.header.payload = count * farmem_region::PAGE_SIZE as u32;
            // The head is made when it is sent, but its length is known.
            message.head.resize(HEADER_BYTES + count as usize * PAGE_ENTRY_BYTES, 0);
            return;
        }
        message.untried = true;
        message.ahead = ahead;
        message.seal_read();
        self.overtake();
    }

    /// A thread waits for what is read, and nobody for what is written: the read that was added
    /// last goes before writes of other pages that are not begun.
    fn overtake(&mut self) {
        let Some(read) = self.unsent.pop_back() else {
            return;
        };
        let pages = self.list[read].wanted.iter().map(|wanted| wanted.page);
        let (first, last) = (pages.clone().min(), pages.max());
        let is_apart = |index: &MessageIndex| {
            let message = &self.list[*index];
            let mut pages = message.wanted.iter().map(|wanted| Some(wanted.page));
            matches!(message.header.action, Action::Write | Action::Commit)
                && pages.all(|page| page < first || page > last)
        };
        let begun = usize::from(self.first_begun);
        let waiting = self.unsent.iter().skip(begun).rev();
        let overtaken = waiting.take_while(|index| is_apart(index)).count();
        self.unsent.insert(self.unsent.len() - overtaken, read);
    }

    /// Whether one more message may be sent, beside `waiting` bytes of pages, before the replies
    /// to others have come.
    pub(crate) fn has_window(&self, index: MessageIndex, waiting: usize) -> bool {
        let (before, bytes) = (self.pages_sent + waiting, self.list[index].page_bytes());
        bytes == 0 || before == 0 || before + bytes <= PAGES_SENT_BYTES_MAX
    }

    /// Adds a free.
    pub(crate) fn add_free(
        &mut self,
        session: &SessionInfo,
        operation: OperationIndex,
        ranges: &[PageRange],
    ) {
        let message = self.add(session, Action::Free, Some(operation));
        message.header.entries = u32::try_from(ranges.len()).expect("at most a message's ranges");
        for range in ranges {
            RangeEntry(*range).encode(&mut message.head);
        }
        // What a program gives back it has given back, whoever has pinned it.
        Free { also_pinned: true }.encode(&mut message.head);
        message.finish();
    }

    /// Adds a malloc.
    pub(crate) fn add_malloc(
        &mut self,
        session: &SessionInfo,
        operation: OperationIndex,
        malloc: Malloc,
    ) {
        let message = self.add(session, Action::Malloc, Some(operation));
        malloc.encode(&mut message.head);
        message.finish();
    }

    /// Asks for slots to write into, ahead of all that is not begun, unless that has been asked already.
    pub(crate) fn add_slots(&mut self, session: &SessionInfo) {
        if self.any(|message| message.header.action == Action::Slots) {
            return;
        }
        let wanted = u32::try_from(SLOTS_ASSIGNED_MAX).expect("a small number");
        let message = self.add(session, Action::Slots, None);
        Slots { wanted }.encode(&mut message.head);
        message.finish();
        let begun = usize::from(self.first_begun);
        self.unsent.make_contiguous()[begun..].rotate_right(1);
    }

    /// Asks where pages lie that were stored before this session was: from one on, as many as a reply tells.
    pub(crate) fn add_map(&mut self, session: &SessionInfo, from: PageIndex) {
        let message = self.add(session, Action::Map, None);
        AskMap { from, since: 0, leases: false, news: false }.encode(&mut message.head);
        message.finish();
    }

    /// Adds a ping.
    pub(crate) fn add_ping(&mut self, session: &SessionInfo) {
        self.add(session, Action::Ping, None).finish();
    }

    /// Moves the first message to be sent to those that were.
    pub(crate) fn mark_sent(&mut self, now: Nanos) {
        if let Some(index) = self.unsent.pop_front() {
            self.list[index].is_sent = true;
            self.list[index].sent_at = now;
            self.pages_sent += self.list[index].page_bytes();
            self.sent.push_back(index);
        }
    }

    /// Takes a message that has its reply out of those that were sent.
    pub(crate) fn take_sent(&mut self, index: MessageIndex) {
        self.list[index].is_sent = false;
        self.pages_sent -= self.list[index].page_bytes();
        if self.sent.front() == Some(&index) {
            self.sent.pop_front();
        } else {
            self.sent.retain(|sent| *sent != index);
        }
    }

    /// Ends a message.
    pub(crate) fn remove(&mut self, index: MessageIndex) {
        let message = &mut self.list[index];
        message.request = 0;
        message.wanted.clear();
        message.frames.clear();
        message.sealed = false;
        message.resent = false;
        message.untried = false;
        message.placing = false;
        message.needs_write = false;
        message.damaged = 0;
        message.put_off = None;
        self.vacant.push(index);
    }

    /// Everything without a reply is to be sent again, in the same order.
    pub(crate) fn send_all_again(&mut self) {
        (self.pages_sent, self.first_begun) = (0, false);
        while let Some(index) = self.sent.pop_back() {
            let message = &mut self.list[index];
            (message.is_sent, message.resent) = (false, true);
            self.unsent.push_front(index);
        }
    }

    /// A message that had a reply is to be sent again, not before `due`. A write's checksums are
    /// computed anew.
    pub(crate) fn send_again(&mut self, index: MessageIndex, due: Nanos) {
        let message = &mut self.list[index];
        message.resent = true;
        message.sealed &= !message.sends_pages();
        let at = self.delayed.partition_point(|(other, _)| *other <= due);
        self.delayed.insert(at, (due, index));
    }

    /// What is due again goes before what has not been sent yet.
    pub(crate) fn take_up_delayed(&mut self, now: Nanos) {
        let mut at = usize::from(self.first_begun);
        while let Some((_, index)) = self.delayed.pop_front_if(|(due, _)| *due <= now) {
            self.unsent.insert(at, index);
            at += 1;
        }
    }

    /// Whether the message at this place of those to be sent waits for the reply to an earlier one: a free for
    /// that to a write of its pages, which may be refused as busy and come again; a write for that to a free,
    /// if [that may](Self::frees_come_late). What was sent before has waited then.
    pub(crate) fn must_wait(&self, at: usize) -> bool {
        let message = &self.list[self.unsent[at]];
        let may = message.header.action == Action::Free || self.frees_come_late;
        if !may || message.resent {
            return false;
        }
        let delayed = self.delayed.iter().map(|(_, index)| index);
        let mut earlier = self.sent.iter().chain(delayed).chain(self.unsent.iter().take(at));
        earlier.any(|index| {
            let other = &self.list[*index];
            other.frees_what_is_written(message) || message.frees_what_is_written(other)
        })
    }

    /// Whether a reply is to be expected, now or once everything is sent.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.sent.is_empty() || !self.unsent.is_empty()
    }

    /// Whether a ping has no reply yet.
    pub(crate) fn has_ping(&self) -> bool {
        self.any(|message| message.header.action == Action::Ping)
    }

    /// Whether a commit, or a request for slots, that goes before this message to be sent has no reply yet:
    /// with it there will be fresh slots.
    pub(crate) fn awaits_slots(&self, index: MessageIndex) -> bool {
        let delayed = self.delayed.iter().map(|(_, index)| index);
        let unsent = self.unsent.iter().take_while(|other| **other != index);
        let mut before = self.sent.iter().rev().chain(unsent).chain(delayed);
        before
            .any(|other| matches!(self.list[*other].header.action, Action::Commit | Action::Slots))
    }

    /// Whether a write of the page has no reply that ends it.
    pub(crate) fn has_write(&self, page: PageIndex) -> bool {
        self.any(|message| {
            matches!(message.header.action, Action::Write | Action::Commit)
                && message.wanted.iter().any(|wanted| wanted.page == page)
        })
    }

    /// Whether a commit without a reply uses the slot.
    pub(crate) fn uses_slot(&self, slot: u32) -> bool {
        self.any(|message| {
            message.header.action == Action::Commit
                && message.entries().any(|entry| entry.slot == slot)
        })
    }

    fn any(&self, is_so: impl Fn(&Message) -> bool) -> bool {
        let delayed = self.delayed.iter().map(|(_, index)| index);
        let mut all = self.sent.iter().rev().chain(&self.unsent).chain(delayed);
        all.any(|index| is_so(&self.list[*index]))
    }
}

impl Message {
    const fn vacant() -> Self {
        Self {
            request: 0,
            header: Header::request(Action::Ping, 0),
            operation: None,
            head: Vec::new(),
            wanted: Vec::new(),
            frames: Vec::new(),
            sealed: false,
            is_sent: false,
            sent_at: Nanos::new(0),
            resent: false,
            untried: false,
            ahead: false,
            placing: false,
            needs_write: false,
            damaged: 0,
            put_off: None,
        }
    }

    fn finish(&mut self) {
        seal(self.header, &mut self.head);
        self.sealed = true;
    }
}

/// The caller's operations, by place.
#[derive(Debug, Default)]
pub(crate) struct Operations {
    list: Vec<Option<Operation>>,
    vacant: Vec<OperationIndex>,
}

impl Operations {
    pub(crate) fn add(&mut self, operation: Operation) -> OperationIndex {
        match self.vacant.pop() {
            Some(index) => {
                self.list[index] = Some(operation);
                index
            }
            None => {
                self.list.push(Some(operation));
                self.list.len() - 1
            }
        }
    }

    pub(crate) fn get_mut(&mut self, index: OperationIndex) -> Option<&mut Operation> {
        self.list.get_mut(index)?.as_mut()
    }

    /// One of its messages has ended; returns the operation if it was the last one.
    pub(crate) fn message_ended(&mut self, index: OperationIndex) -> Option<Operation> {
        let entry = self.list.get_mut(index)?;
        let operation = entry.as_mut()?;
        operation.messages_left -= 1;
        if operation.messages_left > 0 {
            return None;
        }
        self.vacant.push(index);
        entry.take()
    }

    /// Takes all operations out.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = Operation> + '_ {
        self.vacant.clear();
        self.list.drain(..).flatten()
    }
}

#[cfg(test)]
mod tests {
    use farmem_region::{ByteCount, Epoch, Incarnation, PageCount, SessionId};
    use farmem_transport::Endpoint;

    use super::*;

    fn session() -> SessionInfo {
        SessionInfo {
            server: Endpoint::Unix("/nowhere".into()),
            session: SessionId::new(1),
            token: 1,
            epoch: Epoch::new(1),
            incarnation: Incarnation::new(1),
            region: RegionId::new(1),
            granted: ByteCount::new(0),
            pages: PageCount::new(0),
        }
    }

    fn add(messages: &mut Messages, action: Action, first: u64, count: u64) {
        let pages: Vec<_> = (first..first + count)
            .map(|page| {
                let (page, version) = (PageIndex::new(page), Version::new(1));
                (Wanted { page, version }, FrameId::new(0))
            })
            .collect();
        messages.add_pages(&session(), (action, false), 0, pages.into_iter());
    }

    /// First pages of what is to be sent, in its order.
    fn order(messages: &Messages) -> Vec<u64> {
        let first = |index: &MessageIndex| messages.get(*index).wanted[0].page.get();
        messages.unsent.iter().map(first).collect()
    }

    #[test]
    fn a_read_goes_before_writes_of_other_pages() {
        let mut messages = Messages::default();
        add(&mut messages, Action::Write, 10, 10);
        add(&mut messages, Action::Write, 30, 10);
        add(&mut messages, Action::Read, 100, 1);
        assert_eq!(order(&messages), [100, 10, 30]);
        // Not before another read, and not before a write of the same page.
        add(&mut messages, Action::Read, 101, 1);
        add(&mut messages, Action::Read, 15, 1);
        add(&mut messages, Action::Read, 31, 1);
        assert_eq!(order(&messages), [100, 101, 10, 15, 30, 31]);
    }

    #[test]
    fn a_read_does_not_go_before_what_is_begun() {
        let mut messages = Messages::default();
        add(&mut messages, Action::Write, 10, 10);
        add(&mut messages, Action::Write, 30, 10);
        messages.first_begun = true;
        add(&mut messages, Action::Read, 100, 1);
        assert_eq!(order(&messages), [10, 100, 30]);
    }

    /// A write may be refused as busy and come again, in a region with a name a free too: what is about the
    /// same page must not be there by then.
    #[test]
    fn a_write_waits_for_a_free_of_its_pages_and_a_free_for_a_write() {
        let mut messages = Messages { frees_come_late: true, ..Messages::default() };
        let at = Nanos::new(0);
        let range = PageRange { start: PageIndex::new(10), count: PageCount::new(10) };
        messages.add_free(&session(), 0, &[range]);
        add(&mut messages, Action::Write, 19, 1);
        add(&mut messages, Action::Write, 20, 1);
        assert_eq!([0, 1, 2].map(|at| messages.must_wait(at)), [false, true, false]);
        messages.mark_sent(at);
        assert!(messages.must_wait(0), "it is sent");
        let free = messages.sent[0];
        messages.take_sent(free);
        messages.send_again(free, Nanos::new(5));
        assert!(messages.must_wait(0), "it comes again");
        messages.take_up_delayed(Nanos::new(4));
        assert_eq!(order(&messages), [19, 20]);
        messages.take_up_delayed(Nanos::new(5));
        assert_eq!(messages.unsent[0], free, "before what waits for it");
        assert_eq!([0, 1, 2].map(|at| messages.must_wait(at)), [false, true, false]);
        messages.mark_sent(at);
        messages.take_sent(free);
        messages.remove(free);
        assert!(!messages.must_wait(0));
        // And the other way round.
        messages.mark_sent(at);
        messages.add_free(&session(), 0, &[range]);
        assert_eq!([0, 1].map(|at| messages.must_wait(at)), [false, true]);
        messages.frees_come_late = false;
        assert!(messages.must_wait(1), "in every region");
        let write = messages.sent[0];
        messages.take_sent(write);
        messages.remove(write);
        assert!(!messages.must_wait(1));
        add(&mut messages, Action::Write, 10, 1);
        assert!(!messages.must_wait(2), "no free comes late here");
    }

    /// What comes again goes first, and so cannot wait for what goes after it.
    #[test]
    fn a_write_waits_for_slots_that_are_asked_for_before_it_only() {
        let mut messages = Messages::default();
        add(&mut messages, Action::Write, 1, 1);
        let write = messages.unsent[0];
        messages.mark_sent(Nanos::new(0));
        messages.take_sent(write);
        messages.send_again(write, Nanos::new(5));
        add(&mut messages, Action::Write, 2, 1);
        messages.add_slots(&session());
        let [slots, later] = [0, 1].map(|at| messages.unsent[at]);
        assert_eq!(messages.get(slots).header.action, Action::Slots);
        messages.take_up_delayed(Nanos::new(5));
        assert_eq!(messages.unsent, [write, slots, later]);
        assert_eq!([write, later].map(|index| messages.awaits_slots(index)), [false, true]);
        messages.mark_sent(Nanos::new(5));
        messages.mark_sent(Nanos::new(5));
        assert!(messages.awaits_slots(later));
    }

    #[test]
    fn pages_that_are_not_acknowledged_are_limited() {
        let mut messages = Messages::default();
        for at in 0..20 {
            add(&mut messages, Action::Write, at * 64, 64);
        }
        let mut sent = 0;
        while messages.has_window(messages.unsent[0], 0) {
            messages.mark_sent(Nanos::new(0));
            sent += 1;
        }
        assert_eq!(sent * 64 * farmem_region::PAGE_SIZE, PAGES_SENT_BYTES_MAX);
        let first = messages.sent[0];
        messages.take_sent(first);
        messages.remove(first);
        assert!(messages.has_window(messages.unsent[0], 0));
        messages.send_all_again();
        assert_eq!(order(&messages)[0], 64);
        assert_eq!(messages.pages_sent, 0);
    }
}
