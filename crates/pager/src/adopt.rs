//! Finding the program's memory and registering it.

use farmem_region::Nanos;
use farmem_vmem::{AddressRange, Mapping, MappingKind};

use crate::engine::{Engine, Fatal, Io, Scope};
use crate::memory::{MemoryError, Registration, SpaceId};
use crate::ranges::RangeSet;
use crate::streams::Plan;

/// Pages of growth that the pager did not cause after which the map is read again: 1 MiB.
const UNEXPLAINED_PAGES_MAX: usize = 256;
/// Mappings of less than 64 KiB are left alone: all of them together are little memory and much
/// work, and areas that a forked child finds wiped (MADV_WIPEONFORK, which tells random number
/// generators that they were copied) are among them. What of those is out the child would inherit.
const MAPPING_PAGES_MIN: usize = 16;
/// The map is read at most this often: reading costs about 1 us a mapping.
const SCAN_PERIOD_MICROS: u64 = 1_000;

/// When the map was read, and what is left to do.
#[derive(Debug, Default)]
pub(crate) struct Adoption {
    next_scan: Nanos,
    /// A fault came from registered memory that is not known to be.
    pub(crate) unknown: bool,
    /// Read-ahead asked for by faults on pages that are still on their way.
    pub(crate) wanted_plans: Vec<(SpaceId, Plan)>,
}

impl Engine {
    /// Reads the map and registers what is new, if the program is near its limit and has grown.
    /// Returns whether it did.
    ///
    /// # Errors
    /// [`Fatal`] if the map cannot be read.
    pub fn adopt(&mut self, io: &mut Io<'_>) -> Result<bool, Fatal> {
        if self.scope == Scope::Ranges {
            return Ok(false);
        }
        if self.heir.is_unchecked {
            self.check_inheritance(io)?;
            return Ok(!self.heir.is_unchecked);
        }
        let near = self.budget.estimate() >= self.budget.adoption_mark();
        let grown = self.adopted.is_empty()
            || self.adoption.unknown
            || self.budget.unexplained() >= UNEXPLAINED_PAGES_MAX;
        if !near || !grown {
            return Ok(false);
        }
        let now = (io.clock)();
        if now < self.adoption.next_scan {
            return Ok(false);
        }
        if self.changes.are_waiting() || !io.memory.settled() {
            // What has been moved would be taken for new.
            return Ok(false);
        }
        // What is reported from now on of memory that was moved away is news.
        self.changes.all_reported();
        self.forget_past(SpaceId::OWN);
        self.adoption.next_scan = now.plus_micros(SCAN_PERIOD_MICROS);
        self.budget.reset_unexplained();
        self.adoption.unknown = false;
        let mut found = Vec::new();
        let adopted = &self.adopted;
        io.memory
            .mappings(&mut |Mapping { range, kind }| {
                if kind == MappingKind::PrivateAnonymous && range.pages() >= MAPPING_PAGES_MIN {
                    found.extend(adopted.gaps(range));
                }
            })
            .map_err(MemoryError::at("maps"))?;
        // Asked after the map was read: what the pager has mapped since is not in it.
        let mut owned = RangeSet::default();
        io.memory.owned(&mut |range| owned.insert(range));
        let (mut foreign, mut registered) = (0, Vec::new());
        for range in found.into_iter().flat_map(|range| owned.gaps(range)) {
            match io.memory.register(range) {
                Registration::Done => registered.push(range),
                Registration::Foreign => foreign += range.pages() as u64,
                // Gone meanwhile.
                Registration::Refused => {}
            }
        }
        // The program may have unmapped parts since the map was read, which are reported only from
        // their registration on, and mapped others there: moved out, those would read as zero.
        let adopted = &mut self.adopted;
        if !registered.is_empty() {
            io.memory
                .registered(&registered, &mut |part| adopted.insert(part))
                .map_err(MemoryError::at("smaps"))?;
        }
        self.counts.foreign_pages_peak = self.counts.foreign_pages_peak.max(foreign);
        Ok(true)
    }

    /// Looks after a range of private anonymous memory from now on; false if the kernel refuses.
    #[must_use]
    pub fn adopt_range(&mut self, io: &mut Io<'_>, range: AddressRange) -> bool {
        let registered = io.memory.register(range) == Registration::Done;
        if registered {
            self.adopted.insert(range);
        }
        registered
    }

    /// Finds the pages that must stay because the kernel writes there when a thread ends: before each step, for a
    /// thread may just have begun.
    pub(crate) fn refresh_pinned(&mut self, io: &mut Io<'_>) {
        if self.scope == Scope::Ranges {
            // A region has no threads' control blocks, but may lie beside one: pages of it that stayed
            // would be missing in a flush.
            return;
        }
        let pinned = &mut self.pinned;
        io.memory.control_blocks(&mut |range: AddressRange| {
            if pinned.gaps(range).iter().any(|gap| !gap.is_empty()) {
                pinned.insert(range);
            }
        });
    }
}
