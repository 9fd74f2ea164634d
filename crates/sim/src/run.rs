//! One run: the program, the pager's turns and the store take turns until the steps are used up;
//! then every page is read once more.

use std::fmt;
use std::fs::File;

use farmem_pager::{Config, Counts, Engine, Fatal, Io, Memory, Scope, SlotPolicy, SpaceId};
use farmem_region::{Nanos, PageCount, PageStore};
use farmem_vmem::{AddressRange, Uffd};

use crate::handing::Handing;
use crate::memory::{Message, SimMemory};
use crate::program::Doing;
use crate::random::Random;
use crate::space::{Report, pages_of};
use crate::store::SimStore;

/// Pages that the program may have: a third of what it maps, or little.
const LIMITS_PAGES: [u64; 2] = [1024, 256];
/// Windows of frames.
pub(crate) const WINDOWS: usize = 24;
/// Pages of the region at the start: it must grow.
const REGION_PAGES: u64 = 2048;
/// A thread that waits longer than this in virtual time waits for ever.
const PATIENCE_NANOS: u64 = 20_000_000_000;
/// The pager gets below its limit within so many turns when the program stands still.
const TURNS_TO_LIMIT: usize = 2_000;
/// The pager asks this often whether children live.
const CHILD_CHECK_NANOS: u64 = 1_000_000;

/// A defect of the simulated surroundings, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// None.
    Nothing,
    /// The store acknowledges a page and keeps what it had.
    LosesStores,
    /// The store returns what a page was before.
    ReturnsStalePages,
    /// MADV_DONTNEED is not reported.
    ForgetsDrops,
    /// A fill wakes nobody.
    ForgetsToWake,
    /// A page arrives in its frame as zeros.
    LosesMovedPages,
    /// mremap is not reported.
    ForgetsMoves,
    /// Of what is written down of a child that is handed over, two pages are mistaken for each other.
    MixesInherited,
    /// The ranges of a child that is handed over are not written down.
    ForgetsInheritedRanges,
    /// Who waits for an answer of the parent's pager does not hear that there is another one.
    HeirForgetsToWake,
}

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Everything follows from it.
    pub seed: u64,
    /// Steps of the program or the pager.
    pub steps: u64,
    /// A defect to find.
    pub plant: Plant,
}

/// A run that found nothing wrong.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// What the pager did.
    pub counts: Counts,
    /// Virtual time.
    pub nanos: u64,
    /// Children that were taken over by a pager of their own, each of which is the program then.
    pub heirs: u64,
    /// Children that were handed over and given back.
    pub returned: u64,
}

/// What went wrong, and the command that replays it.
#[derive(Debug)]
pub struct Failure {
    /// The run.
    pub setup: Setup,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setup { seed, steps, .. } = self.setup;
        let what = &self.what;
        write!(f, "{what}\nreplay: cargo run -p farmem-sim -- --seed {seed} --steps {steps}")
    }
}

impl std::error::Error for Failure {}

/// Runs one seed.
///
/// # Errors
/// [`Failure`] if a rule is broken.
pub fn run(setup: Setup) -> Result<Outcome, Box<Failure>> {
    let mut simulation = Simulation::new(setup);
    match simulation.run() {
        Ok(outcome) => Ok(outcome),
        Err(what) => Err(Box::new(Failure { setup, what })),
    }
}

pub(crate) struct Simulation {
    pub(crate) setup: Setup,
    limit_bytes: u64,
    pub(crate) engine: Engine,
    pub(crate) memory: SimMemory,
    pub(crate) store: SimStore,
    pub(crate) random: Random,
    next_child_check: u64,
    pub(crate) config: Config,
    pub(crate) handing: Option<Handing>,
    /// What the pagers counted that have handed the program over.
    pub(crate) former: Vec<Counts>,
    pub(crate) heirs: u64,
    pub(crate) returned: u64,
}

impl Simulation {
    fn new(setup: Setup) -> Self {
        let mut random = Random::new(setup.seed);
        let config = Config {
            scope: Scope::Process,
            limit_bytes: LIMITS_PAGES[random.below(2)] << 12,
            readahead_pages_max: [0, 8, 64][random.below(3)],
            secret: [7; 192],
            region_pages: PageCount::new(REGION_PAGES),
            slots: SlotPolicy::Allocated,
            lent_pages_min: 1,
            zeros_are_absent: true,
            heir_mark_bytes: 0,
        };
        let mut memory = SimMemory::new(random.next(), WINDOWS * 256, setup.plant);
        for _ in 0..12 {
            memory.map();
        }
        Self {
            setup,
            limit_bytes: config.limit_bytes,
            engine: Engine::new(&config, WINDOWS),
            config,
            handing: None,
            former: Vec::new(),
            heirs: 0,
            returned: 0,
            memory,
            store: SimStore::new(random.next(), PageCount::new(REGION_PAGES), setup.plant),
            random,
            next_child_check: 0,
        }
    }

    fn run(&mut self) -> Result<Outcome, String> {
        for _ in 0..self.setup.steps {
            self.step()?;
        }
        self.read_everything()?;
        self.check_limit()?;
        let Self { heirs, returned, .. } = *self;
        let mut counts = self.engine.counts();
        for former in &self.former {
            counts.evicted_pages += former.evicted_pages;
            counts.fetched_pages += former.fetched_pages;
            counts.forks += former.forks;
            counts.events += former.events;
        }
        Ok(Outcome { counts, nanos: self.memory.now, heirs, returned })
    }

    fn step(&mut self) -> Result<(), String> {
        let runs = self.random.below(10) < 7 && self.memory.run_program();
        self.memory.now += 200 + self.random.below(2_000) as u64;
        if self.random.once_in(5_000) {
            self.memory.now += self.random.below(3_000_000_000) as u64;
        }
        if !runs {
            self.turn()?;
            if !self.memory.threads.iter().any(|thread| thread.can_run()) {
                self.sleep();
            }
        }
        self.check()
    }

    /// Nobody can go on before something is answered.
    fn sleep(&mut self) {
        let now = self.memory.now;
        let pause = if self.memory.finishing { 1_000_000 } else { 100_000 };
        let next = self.store.next_due().unwrap_or(now + pause);
        self.memory.now = next.clamp(now + 10_000, now + 2_000_000);
    }

    fn check(&mut self) -> Result<(), String> {
        if let Some(what) = self.memory.failure.take().or_else(|| self.store.failure.take()) {
            return Err(what);
        }
        let now = self.memory.now;
        let waits = |doing: &Doing| matches!(doing, Doing::Wait { .. } | Doing::Told { .. });
        let late = |since: u64| now.saturating_sub(since) > PATIENCE_NANOS;
        match self.memory.threads.iter().position(|t| waits(&t.doing) && late(t.since)) {
            Some(thread) => {
                let doing = self.memory.threads[thread].doing;
                Err(format!("liveness: thread {thread} does not go on: {doing:?}"))
            }
            None => Ok(()),
        }
    }

    /// One turn of the pager, as its driver makes it.
    fn turn(&mut self) -> Result<(), String> {
        self.take_turn().map_err(|fatal| format!("the pager gave up: {fatal}"))
    }

    fn take_turn(&mut self) -> Result<(), Fatal> {
        let spaces: Vec<SpaceId> =
            std::iter::once(SpaceId::OWN).chain(self.engine.child_spaces()).collect();
        for space in spaces {
            if !self.engine.is_handed_over(space) {
                self.take_messages(space)?;
            }
        }
        self.take_completions()?;
        let Self { engine, memory, store, .. } = self;
        let now = Nanos::new(memory.now);
        let clock = move || now;
        let io = &mut Io { memory, store, clock: &clock };
        engine.take_looks(io)?;
        engine.catch_up(io);
        if engine.has_deferred() {
            engine.retry_arrived(io);
            engine.retry_deferred(io)?;
        }
        engine.start_wanted_plans(io)?;
        engine.adopt(io)?;
        engine.balance(io)?;
        engine.age_quarantine(io);
        engine.drain_samples(&mut |_| ());
        if now.get() >= self.next_child_check {
            self.next_child_check = now.get() + CHILD_CHECK_NANOS;
            let children: Vec<SpaceId> = engine.child_spaces().collect();
            for space in children {
                if !engine.is_handed_over(space) && !io.memory.space_lives(space) {
                    engine.on_space_gone(io, space);
                }
            }
        }
        self.hand_over();
        // The pager's second thread goes on whatever the pager does.
        self.memory.run_porter();
        Ok(())
    }

    fn take_messages(&mut self, space: SpaceId) -> Result<(), Fatal> {
        let mut messages = self.memory.read(space);
        messages.sort_by_key(|message| matches!(message, Message::Fault { .. }));
        let Self { engine, memory, store, .. } = self;
        let now = Nanos::new(memory.now);
        let clock = move || now;
        let io = &mut Io { memory, store, clock: &clock };
        for message in messages {
            match message {
                Message::Fault { address, write } => {
                    engine.on_fault(io, space, address, write, 0)?;
                }
                Message::Change(Report::Fork(_)) => engine.on_fork(io, space, some_uffd()),
                Message::Change(Report::Remap { from, to }) => {
                    engine.on_remap(io, space, from, to);
                }
                Message::Change(Report::Remove(range)) => engine.on_remove(io, space, range),
                Message::Change(Report::Unmap(range)) => engine.on_unmap(io, space, range),
            }
        }
        Ok(())
    }

    fn take_completions(&mut self) -> Result<(), Fatal> {
        let Self { engine, memory, store, .. } = self;
        let now = Nanos::new(memory.now);
        let clock = move || now;
        let mut done = Vec::new();
        store.advance(now, memory, &mut done)?;
        let io = &mut Io { memory, store, clock: &clock };
        done.into_iter().try_for_each(|completion| engine.on_completion(io, completion))
    }

    /// Reads every page of the program once more.
    fn read_everything(&mut self) -> Result<(), String> {
        self.memory.finishing = true;
        let idle = |doing: &Doing| matches!(doing, Doing::Nothing | Doing::Ended);
        while !self.memory.threads.iter().all(|thread| idle(&thread.doing)) {
            self.finish_step()?;
        }
        let mut ranges: Vec<AddressRange> =
            self.memory.spaces[0].vmas.iter().map(|vma| vma.range).collect();
        ranges.sort_unstable();
        for address in ranges.into_iter().flat_map(pages_of) {
            if self.memory.is_locked(0, address) {
                continue;
            }
            let now = self.memory.now;
            let reader = &mut self.memory.threads[0];
            reader.doing = Doing::Touch { address, value: None };
            reader.since = now;
            while !matches!(self.memory.threads[0].doing, Doing::Nothing) {
                self.finish_step()?;
            }
        }
        Ok(())
    }

    /// What could not be moved out beside the children is moved out in the end.
    fn check_limit(&mut self) -> Result<(), String> {
        let limit = usize::try_from(self.limit_bytes >> 12).unwrap_or(usize::MAX);
        let over = |memory: &SimMemory| memory.resident().anonymous > limit;
        for _ in 0..TURNS_TO_LIMIT {
            if !over(&self.memory) {
                return Ok(());
            }
            self.finish_step()?;
        }
        Err(format!("limit: {:?} are here, of {limit}", self.memory.resident()))
    }

    /// Lets only threads that are in the middle of something go on.
    fn finish_step(&mut self) -> Result<(), String> {
        self.memory.run_program();
        self.memory.now += 5_000;
        self.turn()?;
        self.sleep();
        self.check()
    }
}

/// A fork hands over a descriptor; nothing is ever asked of this one.
fn some_uffd() -> Uffd {
    let null = File::open("/dev/null").expect("/dev/null can be opened");
    Uffd::from_fd(null.into())
}

#[cfg(test)]
mod tests {
    use farmem_region::{Completion, PageIndex, StoreError, Ticket, Version};
    use farmem_vmem::AddressRange;

    use super::*;

    /// While the region is to grow, a store is refused as full (more is promised than the server has), or
    /// the growth is: without more slots the program goes on, but not without the pages of the store.
    #[test]
    fn a_store_that_is_refused_while_the_region_grows_is_not_taken_for_the_growth() {
        let full = || StoreError::Full { server: "here".to_owned(), asked: 4096, free: 0 };
        let refuse = |whose: fn(&farmem_region::Outcome) -> bool| {
            let mut simulation =
                Simulation::new(Setup { seed: 3, steps: 0, plant: Plant::Nothing });
            let ticket: Ticket = loop {
                simulation.step().unwrap();
                let grows = simulation
                    .store
                    .pending(|outcome| matches!(outcome, farmem_region::Outcome::Grown { .. }));
                if let Some(ticket) = grows.and_then(|_| simulation.store.pending(whose)) {
                    break ticket;
                }
            };
            let Simulation { engine, memory, store, .. } = &mut simulation;
            let io = &mut Io { memory, store, clock: &|| Nanos::new(0) };
            engine.on_completion(io, Completion { ticket, result: Err(full()) }).is_err()
        };
        assert!(refuse(|outcome| matches!(outcome, farmem_region::Outcome::Stored)));
        assert!(!refuse(|outcome| matches!(outcome, farmem_region::Outcome::Grown { .. })));
    }

    /// What the engine asks of the store when a page is touched that was moved to where other memory had been
    /// unmapped together with what was looked after, or not, by a thread that reports that later; and whether memory
    /// `is_there` then.
    fn asks_after_a_late_report(together: bool, is_there: bool) -> bool {
        let at = |page: usize, pages| AddressRange::pages_from(0x1000_0000 + (page << 12), pages);
        let (moved, known, unknown) = (at(0, 4), at(16, 4), at(20, 4));
        let mut simulation = Simulation::new(Setup { seed: 3, steps: 0, plant: Plant::Nothing });
        simulation.config.slots = SlotPolicy::Identity { base: moved.start() };
        simulation.config.region_pages = PageCount::new(64);
        let mut engine = Engine::new(&simulation.config, 2);
        let Simulation { memory, store, .. } = &mut simulation;
        memory.finishing = true;
        let vma = |range| crate::space::Vma { range, registered: true };
        memory.spaces[0].vmas = vec![vma(moved), vma(known)];
        let clock = || Nanos::new(0);
        let mut io = Io { memory: &mut *memory, store: &mut *store, clock: &clock };
        assert!(engine.adopt_range(&mut io, moved) && engine.adopt_range(&mut io, known));
        let (page, version) = (PageIndex::new(0), Version::new(1));
        engine.restore(moved.start(), page, version);
        memory.spaces[0].vmas = if is_there { vec![vma(unknown)] } else { Vec::new() };
        memory.spaces[0].changing = 1;
        let mut io = Io { memory: &mut *memory, store: &mut *store, clock: &clock };
        engine.on_remap(&mut io, SpaceId::OWN, moved, unknown.start());
        engine.on_unmap(&mut io, SpaceId::OWN, if together { at(16, 8) } else { unknown });
        memory.spaces[0].changing = 0;
        let mut io = Io { memory: &mut *memory, store: &mut *store, clock: &clock };
        engine.catch_up(&mut io);
        engine.on_fault(&mut io, SpaceId::OWN, unknown.start(), false, 1).unwrap();
        engine.is_awaited()
    }

    #[test]
    fn a_late_report_of_an_unmapping_does_not_concern_what_was_moved_there_since() {
        assert!(asks_after_a_late_report(true, true));
        assert!(!asks_after_a_late_report(true, false));
        // Nothing else was unmapped: it is what was moved there, and what is there now is new.
        assert!(!asks_after_a_late_report(false, true));
    }
}
