//! The driver: reads what the kernel and the store report, hands it to the engine in order, and
//! says what to wait for. It decides nothing.

use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use farmem_region::{Completion, Nanos, PageIndex, PageStore, Version};
use farmem_vmem::{AddressRange, Event, UffdError};

use crate::counts::{Counts, Sample};
use crate::engine::{Config, Engine, Fatal, Io};
use crate::handover::HandOver;
use crate::library::{Flush, Flushed};
use crate::look_out::LookOut;
use crate::memory::{OwnMemory, SpaceId};

/// How long an answer is looked out for before the pager sleeps: as long as to be woken may take on a busy
/// machine, and several times the round trip to a server on this machine or on a fast network.
const ANSWER_MICROS: u64 = 75;
/// Forked children are asked this often whether they still live.
const CHILD_CHECK_MICROS: u64 = 100_000;
/// What had to wait is tried again after this time, and after twice as long each time that nothing has happened
/// meanwhile: who is waited for may need this processor.
const RETRY_MICROS_MIN: u64 = 100;
const RETRY_MICROS_MAX: u64 = 3_200;
/// Threads that are held so that something can be done are looked after this often.
const HOLDING_MICROS: u64 = 100;
/// What had to wait is tried again after this time for pages that another thread of the pager makes the program's own: it rings.
const UNSHARED_MICROS: u64 = 20_000;

/// A fork that cannot be read for lack of a descriptor is tried again after this time: children may have ended.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(1);
/// For so long at most: then the program is stopped rather than left hanging.
const SHORTAGE_NANOS_MAX: u64 = 10_000_000_000;

/// It is another shortage if none was seen for so long.
const SHORTAGE_GAP_NANOS: u64 = 1_000_000_000;

/// What has become ready since the last turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The userfaultfd of the program.
    pub events: bool,
    /// One of a forked child. There may be a thousand of them.
    pub children: bool,
    /// The store's descriptor.
    pub store: bool,
    /// Nothing was, and the pager slept.
    pub slept: bool,
}

impl Ready {
    /// Look at everything.
    pub const ALL: Self = Self { events: true, children: true, store: true, slept: true };
}

/// What the caller waits for before the next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// The store's descriptor, if it has one.
    pub store: Option<RawFd>,
    /// Wait until the store's descriptor is writable, too.
    pub store_writable: bool,
    /// The time at which the turn ended.
    pub now: Nanos,
    /// Turn again at this time at the latest.
    pub deadline: Nanos,
    /// Work was done: turn again at once rather than wait.
    pub again: bool,
    /// The kernel or the store had reported something in this turn: most likely threads go on, and
    /// some of them soon fault again.
    pub served: bool,
    /// Faults were answered, and threads beside a pager that yields run before it: most likely
    /// their next faults are there.
    pub more: bool,
}

/// A pager on real memory.
#[derive(Debug)]
pub struct Pager<S> {
    engine: Engine,
    memory: OwnMemory,
    store: S,
    events: Vec<Event>,
    completions: Vec<Completion>,
    next_child_check: Nanos,
    /// Whether looking out for an answer has paid lately.
    answers: LookOut,
    /// Events were read in this turn.
    had_events: bool,
    /// The store has completed something in this turn.
    had_completions: bool,
    retries: Retries,
    /// Since when there has been no descriptor for a forked child, and when that was seen last.
    short: Option<(Nanos, Nanos)>,
}

/// When to try again.
#[derive(Debug)]
struct Retries {
    micros: u64,
}

impl Retries {
    const fn new() -> Self {
        Self { micros: RETRY_MICROS_MIN }
    }

    /// In how many microseconds to try again, after a turn in which something has happened, or not.
    fn next(&mut self, happened: bool) -> u64 {
        let micros = if happened { RETRY_MICROS_MIN } else { self.micros };
        self.micros = (micros * 2).min(RETRY_MICROS_MAX);
        micros
    }
}

/// The monotonic clock, from an arbitrary zero.
fn clock() -> Nanos {
    use std::sync::OnceLock;
    static ZERO: OnceLock<Instant> = OnceLock::new();
    let zero = *ZERO.get_or_init(Instant::now);
    Nanos::new(u64::try_from(zero.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

impl<S: PageStore> Pager<S> {
    /// Joins memory and store.
    #[must_use]
    pub fn new(config: &Config, mut memory: OwnMemory, store: S) -> Self {
        let windows = memory.scratch().windows();
        Self {
            engine: Engine::new(config, windows),
            memory,
            store,
            events: Vec::with_capacity(64),
            completions: Vec::with_capacity(64),
            next_child_check: Nanos::new(0),
            answers: LookOut::if_useful(true),
            had_events: false,
            had_completions: false,
            retries: Retries::new(),
            short: None,
        }
    }

    /// The time on the pager's clock.
    #[must_use]
    pub fn now() -> Nanos {
        clock()
    }

    /// The engine's totals.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.engine.counts()
    }

    /// Hands over the latencies measured since the last call.
    pub fn drain_samples(&mut self, each: &mut dyn FnMut(Sample)) {
        self.engine.drain_samples(each);
    }

    /// Whether what the pager wakes may run before it: then [`Ready::slept`] must be told exactly.
    #[must_use]
    pub fn yields(&self) -> bool {
        self.memory.yields()
    }

    /// The address space.
    #[must_use]
    pub const fn memory(&self) -> &OwnMemory {
        &self.memory
    }

    /// The store.
    #[must_use]
    pub const fn store(&self) -> &S {
        &self.store
    }

    /// The store.
    pub const fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// Gives the store back, to be closed.
    #[must_use]
    pub fn into_store(self) -> S {
        self.store
    }

    /// Sets another local limit.
    pub fn set_limit(&mut self, bytes: u64) {
        self.engine.set_limit(bytes);
    }

    /// Looks after this range from now on: see [`Engine::adopt_range`].
    #[must_use]
    pub fn adopt_range(&mut self, range: AddressRange) -> bool {
        let Self { engine, memory, store, .. } = self;
        engine.adopt_range(&mut Io { memory, store, clock: &clock }, range)
    }

    /// Makes it known that the servers have a page: see [`Engine::restore`].
    pub fn restore(&mut self, address: usize, page: PageIndex, version: Version) {
        self.engine.restore(address, page, version);
    }

    /// Versions to come are greater than or equal to this one.
    pub fn skip_versions(&mut self, next: Version) {
        self.engine.skip_versions(next);
    }

    /// The pages that the servers have: see [`Engine::copies`].
    pub fn copies(&mut self, each: &mut dyn FnMut(PageIndex, Version)) -> Version {
        self.engine.copies(each)
    }

    /// Begins to hand a forked child over: see [`Engine::begin_hand_over`].
    pub fn begin_hand_over(&mut self, child: SpaceId, thread: u32) {
        self.engine.begin_hand_over(child, thread);
    }

    /// Goes on with it: see [`Engine::hand_over`].
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn hand_over(&mut self, child: SpaceId, out: &mut dyn Write) -> std::io::Result<HandOver> {
        let Self { engine, memory, store, .. } = self;
        engine.hand_over(&mut Io { memory, store, clock: &clock }, child, out)
    }

    /// Takes a child back: see [`Engine::serve_again`].
    pub fn serve_again(&mut self, child: SpaceId) {
        let Self { engine, memory, store, .. } = self;
        engine.serve_again(&mut Io { memory, store, clock: &clock }, child);
    }

    /// A child that was handed over is served by its own pager now.
    pub fn let_go(&mut self, child: SpaceId) {
        let Self { engine, memory, store, .. } = self;
        engine.on_space_gone(&mut Io { memory, store, clock: &clock }, child);
    }

    /// Takes the own memory over: see [`Engine::take_over`].
    ///
    /// # Errors
    /// If it cannot be read, or is no such writing.
    pub fn take_over(&mut self, from: &mut dyn Read) -> std::io::Result<()> {
        let Self { engine, memory, store, .. } = self;
        engine.take_over(&mut Io { memory, store, clock: &clock }, from)
    }

    /// Goes on with a flush: see [`Engine::flush_step`].
    ///
    /// # Errors
    /// [`Fatal`]: the program must be stopped.
    pub fn flush_step(&mut self, flush: &mut Flush) -> Result<Flushed, Fatal> {
        let Self { engine, memory, store, .. } = self;
        engine.flush_step(&mut Io { memory, store, clock: &clock }, flush)
    }

    /// Whether the store has been asked for anything that it has not done yet, or is to be.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.engine.is_busy()
    }

    /// Whether the program uses more than it may, as far as that is known.
    pub const fn exceeds_limit(&self) -> bool {
        self.engine.exceeds_limit()
    }

    /// One round: everything that is there to be read, then a bounded amount of upkeep.
    ///
    /// # Errors
    /// [`Fatal`]: the program must be stopped.
    pub fn turn(&mut self, ready: Ready) -> Result<Wait, Fatal> {
        self.memory.turned();
        if ready.slept {
            self.engine.threads.on_sleep();
        }
        (self.had_events, self.had_completions) = (false, false);
        if ready.events {
            self.take_events_of(SpaceId::OWN)?;
        }
        if ready.children {
            self.take_events_of_children()?;
        }
        // A store that makes its connection anew has no descriptor that would be ready.
        let due = self.store.readiness().deadline.is_some_and(|deadline| deadline <= clock());
        if ready.store || due || self.engine.is_waiting() {
            self.take_completions()?;
        }
        let Self { engine, memory, store, .. } = self;
        let io = &mut Io { memory, store, clock: &clock };
        engine.take_looks(io)?;
        engine.catch_up(io);
        if engine.has_deferred() {
            engine.retry_arrived(io);
            engine.retry_deferred(io)?;
        }
        engine.start_wanted_plans(io)?;
        let mut busy = engine.adopt(io)?;
        busy |= engine.balance(io)?;
        engine.age_quarantine(io);
        if busy && engine.is_waiting() {
            // What was moved out is sent while the next window is chosen.
            self.take_completions()?;
        }
        if self.engine.is_awaited() {
            self.look_out()?;
        }
        let now = clock();
        self.memory.relieve(self.engine.is_held_up(), now);
        if now >= self.next_child_check {
            self.next_child_check = now.plus_micros(CHILD_CHECK_MICROS);
            self.drop_ended_children();
            self.memory.rest();
        }
        // Rather than sleep while there is work.
        let busy = busy || self.memory.help_porter();
        Ok(self.wait(now, busy))
    }

    /// Looks for the answer that a thread waits for, for a short while, rather than sleep: to be
    /// woken costs more than a near server takes. Gives up early on servers that take longer.
    fn look_out(&mut self) -> Result<(), Fatal> {
        if !self.answers.begins() {
            return Ok(());
        }
        let end = clock().plus_micros(ANSWER_MICROS);
        while self.engine.is_awaited() && clock() < end {
            self.take_completions()?;
        }
        self.answers.ended(!self.engine.is_awaited());
        Ok(())
    }

    fn wait(&mut self, now: Nanos, busy: bool) -> Wait {
        let readiness = self.store.readiness();
        let mut deadline = self.engine.next_deadline();
        let served = self.had_events || self.had_completions;
        let happened = served || busy || self.engine.has_cooled();
        if self.memory.is_holding() {
            deadline = deadline.min(now.plus_micros(HOLDING_MICROS));
        } else if self.engine.has_deferred() {
            deadline = deadline.min(now.plus_micros(self.retries.next(happened)));
        } else {
            self.retries = Retries::new();
        }
        if self.engine.is_unsharing() {
            deadline = deadline.min(now.plus_micros(UNSHARED_MICROS));
        }
        if let Some(store) = readiness.deadline {
            deadline = deadline.min(store);
        }
        Wait {
            store: readiness.descriptor,
            store_writable: readiness.wants_write,
            now,
            deadline,
            again: busy,
            served,
            more: self.had_events && self.memory.yields(),
        }
    }

    fn take_events_of_children(&mut self) -> Result<(), Fatal> {
        let children: Vec<SpaceId> = self.engine.child_spaces().collect();
        for space in children {
            if !self.engine.is_handed_over(space) {
                self.take_events_of(space)?;
            }
        }
        Ok(())
    }

    /// The kernel hands out faults before the events that are queued behind them; a fault that
    /// an event would have changed the answer of is refused by the kernel until the event is read
    /// and then tried again.
    fn take_events_of(&mut self, space: SpaceId) -> Result<(), Fatal> {
        self.events.clear();
        match self.memory.read_events(space, &mut self.events) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error @ UffdError::Descriptors { .. }) => return self.bear_shortage(error),
            Err(error) => return Err(error.into()),
        }
        if self.events.iter().any(|event| matches!(event, Event::Fork(_))) {
            self.short = None;
        }
        self.had_events = true;
        let Self { engine, memory, store, events, .. } = self;
        // Who is read to change mappings goes on at once; a fault that was read with it must not be
        // answered as if that had not happened.
        events.sort_by_key(|event| matches!(event, Event::Fault { .. }));
        for event in events.drain(..) {
            match event {
                Event::Fault { address, write, thread } => {
                    let io = &mut Io { memory, store, clock: &clock };
                    engine.on_fault(io, space, address, write, thread)?;
                }
                change => {
                    let io = &mut Io { memory, store, clock: &clock };
                    engine.on_change(io, space, change);
                }
            }
        }
        Ok(())
    }

    /// Makes room for a forked child's descriptor, whose parent waits.
    fn bear_shortage(&mut self, error: UffdError) -> Result<(), Fatal> {
        let now = clock();
        // Whoever wanted to fork may have been killed: then another one is short now.
        let goes_on = self.short.filter(|(_, last)| now.since(*last) < SHORTAGE_GAP_NANOS);
        let since = goes_on.map_or(now, |(since, _)| since);
        self.short = Some((since, now));
        if now.since(since) > SHORTAGE_NANOS_MAX {
            return Err(error.into());
        }
        self.drop_ended_children();
        // Its descriptor stays ready: nobody else would run beside a pager that looks again at once.
        std::thread::sleep(SHORTAGE_PAUSE);
        Ok(())
    }

    fn take_completions(&mut self) -> Result<(), Fatal> {
        let Self { engine, memory, store, completions, .. } = self;
        store.advance(clock(), memory, completions)?;
        self.had_completions |= !completions.is_empty();
        let io = &mut Io { memory, store, clock: &clock };
        for completion in completions.drain(..) {
            engine.on_completion(io, completion)?;
        }
        Ok(())
    }

    fn drop_ended_children(&mut self) {
        let children: Vec<SpaceId> = self.engine.child_spaces().collect();
        let Self { engine, memory, store, .. } = self;
        let io = &mut Io { memory, store, clock: &clock };
        for space in children {
            if !engine.is_handed_over(space) && !io.memory.space_lives(space) {
                engine.on_space_gone(io, space);
            }
        }
    }
}

impl Engine {
    /// Follows a change of the program's mappings.
    fn on_change(&mut self, io: &mut Io<'_>, space: SpaceId, change: Event) {
        match change {
            Event::Fork(uffd) => self.on_fork(io, space, uffd),
            Event::Remap { from, to } => self.on_remap(io, space, from, to),
            Event::Remove(range) => self.on_remove(io, space, range),
            Event::Unmap(range) => self.on_unmap(io, space, range),
            Event::Fault { .. } => unreachable!("faults are no changes"),
        }
    }

    /// When the engine must turn again even if nothing happens.
    fn next_deadline(&self) -> Nanos {
        self.budget.next_reading()
    }

    /// Sets another local limit.
    fn set_limit(&mut self, bytes: u64) {
        self.budget.set_limit(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_tried_less_and_less_often_until_something_happens() {
        let mut retries = Retries::new();
        let waits: Vec<_> = (0..8).map(|_| retries.next(false)).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1_600, 3_200, 3_200, 3_200]);
        assert_eq!([retries.next(true), retries.next(false)], [100, 200]);
    }
}
