//! Cold pages leave dram: the hand goes round over all leaves of all regions.
//!
//! ```text
//! regions:  | leaf | leaf | leaf | leaf | ...      a page that was asked for cools down by half,
//!                      ^ hand                      one that is cold leaves
//! ```
//!
//! A page is compressed or written while its slot is held by a second token, with no lock; then the
//! place in the table is changed if it is still the same. So a page that is being sent or written
//! anew meanwhile is never torn.

use std::collections::HashMap;
use std::ops::Bound;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use farmem_region::{PAGE_SIZE, PageIndex, SessionId};
use farmem_vmem::Slot;
use farmem_wire::PAGES_PER_MESSAGE_MAX;

use super::pages::{HEAT_MAX, SPARE_SLOTS};
use super::{Engine, SharedSession, lock};
use crate::counters::count;
use crate::table::{self, Portion};
use crate::tiers::{Place, Stays};

/// Above this share of the memory, in 32nds, pages begin to leave it...
const FULL_32NDS: u64 = 30;
/// ...until it is down to this.
const ENOUGH_32NDS: u64 = 28;
/// With a file tier, compressed pages take at most this share of the memory, in 32nds.
const COMPRESSED_32NDS: u64 = 20;
/// Passes of the hand that find nothing to do before memory counts as not to be had: one more than
/// the hottest page needs to cool down.
const PASSES_MAX: u32 = 6;
/// Pages that are moved before the places in the table are changed, and their slots free.
const BATCH: usize = 64;
/// Slots that nobody else takes, at most: a batch compressed needs as many, for each of a few
/// threads.
const DEMOTION_SLOTS_MAX: u32 = 4 * BATCH as u32;
/// Slots that are left for reads, at most: the longest message for each of a few connections.
const READING_SLOTS_MAX: u32 = 4 * PAGES_PER_MESSAGE_MAX as u32;
/// Pages that are shared between leaves and have been moved, remembered at most.
const TWINS_MAX: usize = 1 << 16;
/// How long the keeper rests when nothing could be moved.
const REST: Duration = Duration::from_millis(20);

/// Where the hand is.
#[derive(Debug, Default)]
pub(super) struct Hand {
    session: SessionId,
    page: PageIndex,
}

/// What the keeper waits for, and what it remembers.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    hand: Mutex<Hand>,
    wanted: Mutex<Wanted>,
    woken: std::sync::Condvar,
    /// Slots that copies share and that one of them has moved: the others follow to the same
    /// place. Each holds a token for the slot, so that its number means nothing else.
    twins: Mutex<HashMap<u32, (Slot, Place)>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    #[default]
    Nothing,
    Room,
    Stop,
}

/// A cold page, held by a token of its own.
struct Cold {
    page: PageIndex,
    place: Place,
    /// Where it goes, once it is there.
    to: Option<Place>,
    /// Whether it cannot be compressed.
    gains_nothing: bool,
}

/// What the hand found.
enum Step {
    Leaf(SharedSession, Vec<Cold>),
    /// It has come round.
    Round,
}

impl Engine {
    /// Wakes the keeper if memory gets short.
    pub(super) fn note_pressure(&self) {
        if !self.tiers.has_slower() || u64::from(self.arena.taken()) <= self.slots_at(FULL_32NDS) {
            return;
        }
        let mut wanted = self.wanted();
        if *wanted == Wanted::Nothing {
            *wanted = Wanted::Room;
            self.keeper.woken.notify_one();
        }
    }

    /// Keeps some memory free, on a thread of its own, until [`Engine::stop_keeping`].
    pub(crate) fn keep_room(&self) {
        loop {
            let mut wanted = self.wanted();
            while *wanted == Wanted::Nothing {
                wanted = self.keeper.woken.wait(wanted).unwrap_or_else(PoisonError::into_inner);
            }
            if *wanted == Wanted::Stop {
                return;
            }
            drop(wanted);
            let above = u64::from(self.arena.taken()).saturating_sub(self.slots_at(ENOUGH_32NDS));
            let moved = if above > 0 { self.demote(above as usize) } else { 0 };
            let mut wanted = self.wanted();
            if moved == 0 && *wanted == Wanted::Room {
                *wanted = Wanted::Nothing;
                if above > 0 {
                    let rested = self.keeper.woken.wait_timeout(wanted, REST);
                    drop(rested.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// Ends [`Engine::keep_room`].
    pub(crate) fn stop_keeping(&self) {
        *self.wanted() = Wanted::Stop;
        self.keeper.woken.notify_one();
    }

    /// Moves about `wanted` cold pages to slower tiers, or as many as can be moved. Returns how many
    /// were. The caller holds no lock.
    pub(super) fn demote(&self, wanted: usize) -> usize {
        let (mut moved, mut idle_rounds) = (0, 0);
        while moved < wanted && idle_rounds < PASSES_MAX {
            match self.step() {
                Step::Leaf(session, mut cold) => {
                    while moved < wanted && !cold.is_empty() {
                        let batch = cold.drain(..cold.len().min(BATCH)).collect();
                        let count = self.move_out(&session, batch);
                        if count > 0 {
                            idle_rounds = 0;
                        }
                        moved += count;
                    }
                    self.let_go(cold);
                }
                Step::Round => {
                    self.forget_twins();
                    idle_rounds += 1;
                }
            }
        }
        moved
    }

    /// Leaves pages where they are until the hand comes again.
    fn let_go(&self, cold: Vec<Cold>) {
        let mut slots = Vec::new();
        for page in cold {
            self.tiers.give_up(page.place, &mut slots);
        }
        self.arena.release(slots);
    }

    /// Takes the hand one leaf on.
    fn step(&self) -> Step {
        let mut hand = self.keeper.hand.lock().unwrap_or_else(PoisonError::into_inner);
        let from = (Bound::Included(hand.session), Bound::Unbounded);
        let next = {
            let sessions = self.sessions();
            let mut range = sessions.by_id.range::<SessionId, _>(from);
            range.next().map(|(id, shared)| (*id, shared.clone()))
        };
        let Some((id, shared)) = next else {
            *hand = Hand::default();
            return Step::Round;
        };
        if id != hand.session {
            *hand = Hand { session: id, page: PageIndex::new(0) };
        }
        let mut cold = Vec::new();
        let sinks = self.sinks_compressed();
        {
            let session = lock(&shared);
            let Some((first, leaf)) = session.region.table.leaf_from(hand.page) else {
                *hand = Hand { session: SessionId::new(id.get() + 1), page: PageIndex::new(0) };
                drop(session);
                return Step::Leaf(shared, cold);
            };
            hand.page = PageIndex::new(first.get() + table::LEAF_PAGES as u64);
            let pins = &session.region.pins;
            let mut leaf = table::lock(leaf);
            for (at, portion) in (first.get()..).zip(&mut leaf.portions) {
                let page = PageIndex::new(at);
                let Some(portion) = portion.as_mut().filter(|_| !pins.contains(page)) else {
                    continue;
                };
                if is_cold(portion, sinks) {
                    let place = self.tiers.share(&portion.place);
                    cold.push(Cold { page, place, to: None, gains_nothing: false });
                }
            }
        }
        Step::Leaf(shared, cold)
    }

    /// Moves pages of one leaf; returns how many.
    fn move_out(&self, shared: &SharedSession, mut cold: Vec<Cold>) -> usize {
        for page in &mut cold {
            match self.compressed(&page.place) {
                Ok(place) => page.to = Some(place),
                Err(stays) => page.gains_nothing = stays == Stays::GainsNothing,
            }
        }
        self.write_out(&mut cold);
        let session = lock(shared);
        let (mut moved, mut unused) = (0, Vec::new());
        for Cold { page, place, to, gains_nothing } in cold {
            let Some(to) = to else {
                if gains_nothing {
                    session.region.table.with(page, |portion| cannot_move(portion, &place));
                }
                self.tiers.give_up(place, &mut unused);
                continue;
            };
            let mut to = Some(to);
            session.region.table.with(page, |portion| {
                if portion.place.is(&place)
                    && let Some(to) = to.take()
                {
                    session.region.table.note_move(&self.tiers, page, &to);
                    let former = std::mem::replace(&mut portion.place, to);
                    self.tiers.give_up(former, &mut unused);
                    moved += 1;
                }
            });
            to.into_iter().for_each(|to| self.tiers.give_up(to, &mut unused));
            self.tiers.give_up(place, &mut unused);
        }
        drop(session);
        count(&self.counters.demoted_pages, moved);
        self.arena.release(unused);
        self.surplus.store(true, Ordering::Relaxed);
        moved
    }

    /// A page compressed, or where its twin lies.
    fn compressed(&self, place: &Place) -> Result<Place, Stays> {
        let Place::Dram(slot) = place else {
            return Err(Stays::NoRoom);
        };
        // Ours, and the table's.
        if self.arena.tokens(slot) <= 2 {
            return self.tiers.compress(slot);
        }
        if let Some((_, twin)) = self.twins().get(&slot.number()) {
            return Ok(self.tiers.share(twin));
        }
        let place = self.tiers.compress(slot)?;
        self.remember_twin(slot, &place);
        Ok(place)
    }

    fn remember_twin(&self, slot: &Slot, place: &Place) {
        let mut twins = self.twins();
        if twins.len() < TWINS_MAX {
            let entry = twins.entry(slot.number());
            entry.or_insert_with(|| (self.arena.share(slot), self.tiers.share(place)));
        }
    }

    /// Forgets those that nobody else holds any more.
    pub(super) fn forget_twins(&self) {
        let mut unused = Vec::new();
        let mut twins = self.twins();
        let over = |_: &u32, twin: &mut (Slot, Place)| self.arena.tokens(&twin.0) == 1;
        for (_, (slot, place)) in twins.extract_if(over) {
            unused.push(slot);
            self.tiers.give_up(place, &mut unused);
        }
        drop(twins);
        self.arena.release(unused);
    }

    /// Writes what could not be compressed, or is to leave memory altogether, to the file.
    fn write_out(&self, cold: &mut [Cold]) {
        if !self.tiers.has_file() {
            return;
        }
        let mut slots = Vec::new();
        let mut whose = Vec::new();
        for (at, page) in cold.iter_mut().enumerate().filter(|(_, page)| page.to.is_none()) {
            let Some(slot) = self.in_a_slot(&page.place) else {
                continue;
            };
            slots.push(slot);
            whose.push(at);
        }
        match self.tiers.write_out(&slots) {
            Ok(places) => {
                for (at, place) in whose.into_iter().zip(places) {
                    if let Place::Dram(slot) = &cold[at].place
                        && self.arena.tokens(slot) > 3
                    {
                        self.remember_twin(slot, &place);
                    }
                    cold[at].to = Some(place);
                }
            }
            Err(error) => {
                count(&self.counters.tier_failures, 1);
                self.tell("tier_failed", format_args!("cannot write to the file tier: {error}"));
            }
        }
        self.arena.release(slots);
    }

    /// The page in a slot.
    fn in_a_slot(&self, place: &Place) -> Option<Slot> {
        match place {
            Place::Dram(slot) => Some(self.arena.share(slot)),
            Place::Compressed(_) => {
                let mut slots = Vec::new();
                if !self.arena.take(1, &mut slots) {
                    return None;
                }
                let mut slot = slots.pop()?;
                if self.tiers.unpack(place, &mut slot).is_ok() {
                    return Some(slot);
                }
                self.arena.release([slot]);
                None
            }
            Place::File(_) => None,
        }
    }

    /// Slots that only demotion may take.
    pub(super) fn demotion_slots(&self) -> u32 {
        if self.tiers.has_slower() { DEMOTION_SLOTS_MAX.min(self.arena.slots() / 8) } else { 0 }
    }

    /// Slots that only reads may take, for as long as it takes to send what is copied there.
    pub(super) fn reading_slots(&self) -> u32 {
        if self.tiers.has_slower() { READING_SLOTS_MAX.min(self.arena.slots() / 8) } else { 0 }
    }

    /// Whether a page that is asked for often may stay in memory.
    pub(super) fn may_promote(&self) -> bool {
        let free = self.arena.slots() - self.arena.taken();
        free > self.demotion_slots() + self.reading_slots()
    }

    /// Whether compressed pages are to leave memory: they take more of it than they should, or
    /// there is none left.
    fn sinks_compressed(&self) -> bool {
        let free = self.arena.slots() - self.arena.taken();
        self.tiers.has_file()
            && (free < self.demotion_slots() + self.reading_slots() + SPARE_SLOTS
                || self.tiers.usage().compressed_slots > self.slots_at(COMPRESSED_32NDS))
    }

    /// So many 32nds of the memory that is lent, in slots.
    fn slots_at(&self, share: u64) -> u64 {
        self.config.memory.get() / PAGE_SIZE as u64 * share / 32
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.keeper.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn twins(&self) -> std::sync::MutexGuard<'_, HashMap<u32, (Slot, Place)>> {
        self.keeper.twins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a page may leave its tier; one that may not yet cools down.
fn is_cold(portion: &mut Portion, sinks_compressed: bool) -> bool {
    let may = match &portion.place {
        Place::Dram(_) => true,
        Place::Compressed(_) => sinks_compressed,
        Place::File(_) => false,
    };
    let is_cold = may && portion.heat == 0;
    portion.heat /= 2;
    is_cold
}

/// A page that nothing can be done about is left alone for some passes.
fn cannot_move(portion: &mut Portion, place: &Place) {
    if portion.place.is(place) {
        portion.heat = HEAT_MAX;
    }
}
