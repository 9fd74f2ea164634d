//! A forked child's own pager takes over from its parent's: what is known of the child's memory goes
//! from one to the other, in a file.
//!
//! The parent's pager stops to answer the child's faults, waits until nothing of the child's is
//! under way, and writes down which pages are out, and where. From then on it reads nothing of the
//! child. The child's slots stay held until the other one says that it has a region of its own, a
//! copy of this one's. Should it not, everything goes on as if it had never been asked for.
//!
//! ```text
//! | secret (192 bytes) | next version | ranges | start, end, ... | pages | address, slot, version,
//! | fingerprint (16 bytes), ... |         numbers are u64, little-endian
//! ```

use std::io::{self, BufReader, BufWriter, Read, Write};

use farmem_region::{Nanos, PageIndex, Version};
use farmem_vmem::{AddressRange, Look};

use crate::engine::{Engine, Fatal, Fault, Io};
use crate::memory::{MemoryError, SpaceId};
use crate::ranges::RangeSet;
use crate::table::{Entry, Place};

/// A child that is handed over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leaving {
    /// One of its threads.
    thread: u32,
    /// The newest request when it began: stores up to here may be of its pages.
    last_ticket: u64,
    /// All is written down: the child's reports are read by somebody else.
    pub(crate) is_gone: bool,
}

/// How far a hand-over has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandOver {
    /// Something of the child's is under way: turn, then try again.
    NotYet,
    /// It has ended, or was never there.
    NoChild,
    /// All is written down.
    Done,
}

/// What is known of whether a child that is served gets a pager of its own.
#[derive(Debug, Default)]
pub(crate) struct Heirless {
    faults: u32,
    /// Since when the child is so large that its own pager must be on its way.
    large_since: Option<Nanos>,
    /// Nobody came.
    is_left: bool,
}

/// Faults of a child that are answered in any case: most children end soon.
const FAULTS_FREE: u32 = 8;
/// How long a child that is so large waits for its own pager, all in all. To start one takes some
/// 20 ms; what is brought in before is not held to the limit.
const HEIR_WAIT_NANOS: u64 = 300_000_000;

/// What an heir does before all else.
#[derive(Debug, Default)]
pub(crate) struct Heir {
    /// What was inherited has not been compared with the memory that is there: nothing is answered
    /// and nothing moved out.
    pub(crate) is_unchecked: bool,
}

/// No address of a program is above.
const ADDRESS_MAX: usize = 0x7fff_ffff_f000;
/// And none that can be mapped is below.
const ADDRESS_MIN: usize = 0x1_0000;

impl Engine {
    /// Begins to hand a child over; `thread` is one of its threads. Its faults are no longer answered.
    pub fn begin_hand_over(&mut self, child: SpaceId, thread: u32) {
        let last_ticket = self.last_ticket();
        if let Some(space) = self.space_mut(child) {
            space.leaving = Some(Leaving { thread, last_ticket, is_gone: false });
        }
    }

    /// Writes down what is known of a child, once nothing of it is under way.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn hand_over(
        &mut self,
        io: &mut Io<'_>,
        child: SpaceId,
        out: &mut dyn Write,
    ) -> io::Result<HandOver> {
        let leaving = self.space_mut(child).and_then(|space| space.leaving);
        let Some(leaving) = leaving.filter(|leaving| !leaving.is_gone) else {
            return Ok(HandOver::NoChild);
        };
        let fetches = self.fetches.values().chain(&self.arrived);
        let waits = fetches.filter(|fetch| fetch.space == child).count() > 0
            || self.stores.keys().any(|&ticket| ticket <= leaving.last_ticket)
            || self.changes.concern(child);
        // The look comes last: from then on what is known stays true, as nothing more is read.
        if waits || io.memory.look(child, 0) == Look::Changing {
            return Ok(HandOver::NotYet);
        }
        self.settle_doubts(io, child, leaving.thread);
        self.write_down(child, out)?;
        if let Some(leaving) = self.space_mut(child).and_then(|space| space.leaving.as_mut()) {
            leaving.is_gone = true;
        }
        Ok(HandOver::Done)
    }

    fn write_down(&mut self, child: SpaceId, out: &mut dyn Write) -> io::Result<()> {
        let (secret, next_version) = (self.secret(), self.take_version());
        let Some(space) = self.space_mut(child) else {
            return Ok(());
        };
        let out = &mut BufWriter::new(out);
        let number = |out: &mut dyn Write, number: u64| out.write_all(&number.to_le_bytes());
        out.write_all(&secret)?;
        number(out, next_version.get())?;
        let ranges: Vec<AddressRange> = space.ranges.iter().collect();
        number(out, ranges.len() as u64)?;
        for range in ranges {
            number(out, range.start() as u64)?;
            number(out, range.end() as u64)?;
        }
        let mut pages = 0;
        let is_out = |entry: &Entry| entry.place() == Place::Out;
        space.table.for_each(&mut |_, entry| pages += u64::from(is_out(entry)));
        number(out, pages)?;
        let mut result = Ok(());
        space.table.for_each(&mut |address, entry| {
            if is_out(entry)
                && let (Ok(()), Some((slot, version))) = (&result, entry.copy())
            {
                result = [address as u64, slot.get(), version.get()]
                    .iter()
                    .try_for_each(|part| number(out, *part))
                    .and_then(|()| out.write_all(&entry.fingerprint.to_le_bytes()));
            }
        });
        result.and_then(|()| out.flush())
    }

    /// The child is served again, after all: nobody has taken it over.
    pub fn serve_again(&mut self, io: &mut Io<'_>, child: SpaceId) {
        if let Some(space) = self.space_mut(child) {
            space.leaving = None;
            io.memory.wake(child, AddressRange::new(ADDRESS_MIN, ADDRESS_MAX));
        }
    }

    /// Whether a fault of a child that needs memory is left to the child's own pager, which is on its
    /// way.
    pub(crate) fn awaits_heir(&mut self, io: &Io<'_>, fault: &Fault) -> bool {
        let mark = self.heir_mark;
        let Some(space) = self.space_mut(fault.space).filter(|space| space.parent.is_some()) else {
            return false;
        };
        let now = (io.clock)();
        let heirless = &mut space.heirless;
        heirless.faults += 1;
        if mark == 0 || heirless.is_left || heirless.faults <= FAULTS_FREE {
            return false;
        }
        let Some(since) = heirless.large_since else {
            let size = io.memory.resident_of(fault.thread);
            heirless.large_since = size.filter(|&pages| pages >= mark).map(|_| now);
            return heirless.large_since.is_some();
        };
        heirless.is_left = now.since(since) > HEIR_WAIT_NANOS;
        !heirless.is_left
    }

    /// Whether somebody else reads the reports of a child.
    #[must_use]
    pub fn is_handed_over(&self, child: SpaceId) -> bool {
        let leaving = self.spaces.iter().find(|space| space.id == child).and_then(|s| s.leaving);
        leaving.is_some_and(|leaving| leaving.is_gone)
    }

    /// Takes the own memory over from the pager of the parent that it was forked from. To be called
    /// first of all; the region is a copy of the parent's.
    ///
    /// # Errors
    /// If it cannot be read, or is no such writing.
    pub fn take_over(&mut self, io: &mut Io<'_>, from: &mut dyn Read) -> io::Result<()> {
        let from = &mut BufReader::new(from);
        let mut secret = [0; 192];
        from.read_exact(&mut secret)?;
        self.set_secret(secret);
        let version = read_number(from)?;
        self.skip_versions(Version::new(version));
        for _ in 0..read_number(from)? {
            let (start, end) = (read_address(from)?, read_address(from)?);
            let range = AddressRange::new(start, end);
            self.adopted.insert(range);
            // Which of the child's threads were dropping pages then is not known.
            self.quarantine.insert(range);
        }
        let mut slots = Vec::new();
        for _ in 0..read_number(from)? {
            let address = read_address(from)?;
            let (slot, version) = (PageIndex::new(read_number(from)?), read_number(from)?);
            let mut fingerprint = [0; 16];
            from.read_exact(&mut fingerprint)?;
            let mut entry = Entry::new(Place::Out);
            entry.set_copy(slot, Version::new(version), u128::from_le_bytes(fingerprint));
            self.own_table().put(address, entry);
            slots.push(slot);
        }
        // What else is in the copy is the parent's, or of nobody.
        let unused = self.slots.inherit(slots);
        self.releases.extend(unused);
        self.heir.is_unchecked = true;
        // Whom the parent's pager has heard and not answered is heard again.
        io.memory.wake(SpaceId::OWN, AddressRange::new(ADDRESS_MIN, ADDRESS_MAX));
        Ok(())
    }

    /// Compares what was inherited with the memory that is there, as soon as nothing changes: the
    /// parent may have had mappings that its children do not get (MADV_DONTFORK), and where they were
    /// there is nothing, or something new.
    pub(crate) fn check_inheritance(&mut self, io: &mut Io<'_>) -> Result<(), Fatal> {
        if self.changes.are_waiting() || !io.memory.settled() {
            return Ok(());
        }
        let mut mapped = Vec::new();
        let adopted = &self.adopted;
        io.memory
            .mappings(&mut |mapping| {
                let parts = adopted.overlapping(mapping.range).into_iter();
                mapped.extend(parts.map(|part| part.intersect(mapping.range)));
            })
            .map_err(MemoryError::at("maps"))?;
        let mut there = RangeSet::default();
        for range in mapped {
            match io.memory.look(SpaceId::OWN, range.start()) {
                Look::Registered => there.insert(range),
                Look::Nothing => {}
                Look::Changing | Look::Ended => return Ok(()),
            }
        }
        if !io.memory.settled() {
            // Something began to change after the first look: it might have been missed.
            return Ok(());
        }
        let mut gone = Vec::new();
        self.own_table().retain(&mut |address, entry| {
            let stays = there.find(address).is_some();
            if !stays {
                gone.push(*entry);
            }
            stays
        });
        self.release_entries(&gone);
        self.adopted = there;
        self.heir.is_unchecked = false;
        self.evict_after = Nanos::new(0);
        Ok(())
    }
}

fn read_number(from: &mut dyn Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn read_address(from: &mut dyn Read) -> io::Result<usize> {
    let address = usize::try_from(read_number(from)?).ok().filter(|&at| at <= ADDRESS_MAX);
    address.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no address of a program"))
}
