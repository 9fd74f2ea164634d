//! Sessions: who has reserved how much.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use farmem_region::{ByteCount, Epoch, Nanos, PAGE_SIZE, SessionId};
use farmem_vmem::Slot;
use farmem_wire::{FullBody, Header, RangeEntry, RefusalCode};

use crate::engine::Refusal;
use crate::leases::Leases;
use crate::region::Region;

/// Names a connection, for the server's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ConnectionId(pub(crate) u64);

/// One client's session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) token: u64,
    /// What the client calls itself, or the region's name.
    pub(crate) name: String,
    pub(crate) granted: ByteCount,
    pub(crate) dynamic: bool,
    pub(crate) region: Region,
    /// Whether it is a named region's: then it lives until that is deleted.
    pub(crate) is_resident: bool,
    /// Whether it is to be gone after a restart.
    pub(crate) is_temporary: bool,
    pub(crate) traffic: Arc<Traffic>,
    /// Connections that may use the session, with the epoch in which they came.
    pub(crate) attached: Vec<(ConnectionId, Epoch)>,
    /// Of a named region.
    pub(crate) leases: Leases,
    /// Since when no connection is attached.
    pub(crate) orphaned_since: Option<Nanos>,
    /// Slots that the client, which has the arena's file, writes its next pages into. They are
    /// the session's and not a connection's: while it lives, the client may be writing.
    pub(crate) assigned: HashMap<u32, Slot>,
    /// Everything is freed; what still arrives is refused.
    pub(crate) ended: bool,
}

impl Session {
    /// Whether the connection may do what the header asks for.
    pub(crate) fn check(&self, from: ConnectionId, header: &Header) -> Result<(), RefusalCode> {
        if self.ended {
            return Err(RefusalCode::NoSession);
        }
        if header.token != self.token {
            return Err(RefusalCode::WrongToken);
        }
        if !self.attached.iter().any(|(attached, _)| *attached == from) {
            return Err(RefusalCode::NotAttached);
        }
        self.check_epoch(header)
    }

    /// Whether the header's epoch is the current one.
    pub(crate) fn check_epoch(&self, header: &Header) -> Result<(), RefusalCode> {
        if header.epoch != self.region.epoch {
            return Err(RefusalCode::StaleEpoch);
        }
        Ok(())
    }

    /// Whether the header names the session's region.
    pub(crate) fn check_region(&self, header: &Header) -> Result<(), RefusalCode> {
        if header.region != self.region.id {
            return Err(RefusalCode::NoRegion);
        }
        Ok(())
    }

    /// As [`Session::check_region`], for a request that changes the region.
    pub(crate) fn check_change(&self, header: &Header) -> Result<(), RefusalCode> {
        self.check_region(header)?;
        if self.region.is_frozen {
            return Err(RefusalCode::Frozen);
        }
        Ok(())
    }

    /// Whether a connection may change the region now, of which other clients may believe that they know
    /// it. To be called under the lock under which it is changed.
    pub(crate) fn check_others(&mut self, from: ConnectionId) -> Result<(), RefusalCode> {
        if self.is_resident { self.leases.check_change(from, Instant::now()) } else { Ok(()) }
    }

    /// Whether ranges lie in the region.
    pub(crate) fn check_bounds(
        &self,
        mut ranges: impl Iterator<Item = RangeEntry>,
    ) -> Result<(), RefusalCode> {
        if ranges.any(|range| !self.region.contains_range(range.0)) {
            return Err(RefusalCode::OutOfBounds);
        }
        Ok(())
    }

    /// Whether ranges lie in the region and consist of whole pages of its page size.
    pub(crate) fn check_ranges(
        &self,
        mut ranges: impl Iterator<Item = RangeEntry> + Clone,
    ) -> Result<(), RefusalCode> {
        self.check_bounds(ranges.clone())?;
        if !ranges.all(|range| self.region.is_aligned(range.0)) {
            return Err(RefusalCode::Malformed);
        }
        Ok(())
    }

    /// A connection may use the session from now on.
    pub(crate) fn attach(&mut self, connection: ConnectionId) {
        self.attached.push((connection, self.region.epoch));
    }

    /// How many connections have come since somebody took over last, but for one. The others are
    /// refused whatever they ask for, until they come again by another connection.
    pub(crate) fn current(&self, but: ConnectionId) -> usize {
        let is_one = |(attached, epoch): &&_| *attached != but && *epoch == self.region.epoch;
        self.attached.iter().filter(is_one).count()
    }

    /// A connection is told of nothing any more.
    pub(crate) fn end_news(&mut self, connection: ConnectionId) {
        if self.region.news.as_mut().is_some_and(|news| news.leave(connection)) {
            self.region.news = None;
        }
    }

    pub(crate) fn detach(&mut self, connection: ConnectionId, now: Nanos) {
        self.attached.retain(|(attached, _)| *attached != connection);
        self.end_news(connection);
        if self.attached.is_empty() && self.orphaned_since.is_none() && !self.is_resident {
            self.orphaned_since = Some(now);
        }
    }
}

/// What the connections of one session hold of the memory that all tenants share for pages on their
/// way: each session has a share, so that one that sends or takes slowly delays nobody else.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// Slots that writes are being received into.
    incoming: AtomicU32,
    /// Bytes that are held for replies that wait. The pages among them keep their slots until they are
    /// sent, even if they are written anew meanwhile.
    outgoing: AtomicUsize,
}

impl Traffic {
    /// Lets a write in, unless the session would then hold more slots than `limit`.
    pub(crate) fn let_in(&self, slots: u32, limit: u32) -> Result<(), RefusalCode> {
        let let_in = |held: u32| held.checked_add(slots).filter(|held| *held <= limit);
        match self.incoming.fetch_update(Ordering::Relaxed, Ordering::Relaxed, let_in) {
            Ok(_) => Ok(()),
            Err(_) => Err(RefusalCode::Busy),
        }
    }

    /// A write that was let in is over.
    pub(crate) fn let_go(&self, slots: u32) {
        self.incoming.fetch_sub(slots, Ordering::Relaxed);
    }

    /// One connection's replies were so many bytes, and are so many now.
    pub(crate) fn replies(&self, before: usize, now: usize) {
        self.outgoing.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
    }

    pub(crate) fn outgoing(&self) -> usize {
        self.outgoing.load(Ordering::Relaxed)
    }
}

/// How much is promised. Nothing is promised twice.
#[derive(Debug)]
pub(crate) struct Reservation {
    capacity: u64,
    reserved: AtomicU64,
}

impl Reservation {
    pub(crate) const fn new(capacity: ByteCount) -> Self {
        Self { capacity: capacity.get(), reserved: AtomicU64::new(0) }
    }

    /// Reserves what was reserved before.
    pub(crate) fn restore(&self, amount: ByteCount) {
        self.reserved.store(amount.get(), Ordering::Relaxed);
    }

    pub(crate) const fn capacity(&self) -> ByteCount {
        ByteCount::new(self.capacity)
    }

    pub(crate) fn reserved(&self) -> ByteCount {
        ByteCount::new(self.reserved.load(Ordering::Relaxed))
    }

    pub(crate) fn free(&self) -> ByteCount {
        ByteCount::new(self.capacity - self.reserved().get())
    }

    /// Reserves `asked` bytes, or, if `partial`, what there is of them in whole pages.
    pub(crate) fn reserve(&self, asked: ByteCount, partial: bool) -> Result<ByteCount, Refusal> {
        let page = PAGE_SIZE as u64;
        let full = || Refusal::full(FullBody { asked, free: self.free() });
        let wanted = asked.get().checked_next_multiple_of(page).ok_or_else(full)?;
        let mut granted = wanted;
        let update = self.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |reserved| {
            let free = (self.capacity - reserved) / page * page;
            granted = if partial { wanted.min(free) } else { wanted };
            (granted <= free && granted > 0).then(|| reserved + granted)
        });
        update.map(|_| ByteCount::new(granted)).map_err(|_| full())
    }

    pub(crate) fn release(&self, amount: ByteCount) {
        self.reserved.fetch_sub(amount.get(), Ordering::Relaxed);
    }
}
