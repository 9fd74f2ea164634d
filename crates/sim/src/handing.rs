//! Children that get a pager of their own: the engine of the parent's pager hands one over, a new
//! engine takes it over, and from then on the child is the program. Or nobody takes it, and it is
//! given back.

use std::io::Cursor;

use farmem_pager::{Config, Engine, HandOver, Io, SpaceId};
use farmem_region::{Nanos, PageCount};

use crate::run::{Plant, Simulation, WINDOWS};

/// One turn in so many begins a hand-over, if there is a child.
const TURNS_BETWEEN: usize = 120;
/// One that is handed over is given back in one case of so many.
const RETURNS: usize = 3;
/// And is without any pager for up to so many turns.
const TURNS_ALONE: usize = 20;

/// A child that is being handed over.
#[derive(Debug)]
pub(crate) struct Handing {
    child: SpaceId,
    /// What was written down, and the turns until somebody has read it.
    legacy: Option<(Vec<u8>, usize)>,
}

impl Simulation {
    /// Begins to hand a child over, or goes on with it.
    pub(crate) fn hand_over(&mut self) {
        let Some(mut handing) = self.handing.take() else {
            return self.begin();
        };
        if let Some((legacy, turns)) = handing.legacy.take() {
            let returns = self.memory.finishing || !self.memory.lives(handing.child);
            if returns || (turns == 0 && self.random.once_in(RETURNS)) {
                self.give_back(handing.child);
            } else if turns > 0 || !self.memory.may_become(handing.child) {
                handing.legacy = Some((legacy, turns.saturating_sub(1)));
                self.handing = Some(handing);
            } else {
                self.succeed(&handing, legacy);
            }
            return;
        }
        let mut legacy = Vec::new();
        let Self { engine, memory, store, .. } = self;
        let now = Nanos::new(memory.now);
        let io = &mut Io { memory, store, clock: &move || now };
        match engine.hand_over(io, handing.child, &mut legacy) {
            Ok(HandOver::NotYet) => self.handing = Some(handing),
            Ok(HandOver::NoChild) | Err(_) => self.give_back(handing.child),
            Ok(HandOver::Done) => {
                handing.legacy = Some((legacy, self.random.below(TURNS_ALONE)));
                self.handing = Some(handing);
            }
        }
    }

    fn begin(&mut self) {
        if self.memory.finishing || !self.random.once_in(TURNS_BETWEEN) {
            return;
        }
        let found = self.engine.child_spaces().find(|child| self.memory.lives(*child));
        if let Some(child) = found {
            self.engine.begin_hand_over(child, 0);
            self.handing = Some(Handing { child, legacy: None });
        }
    }

    fn give_back(&mut self, child: SpaceId) {
        let Self { engine, memory, store, .. } = self;
        let now = Nanos::new(memory.now);
        engine.serve_again(&mut Io { memory, store, clock: &move || now }, child);
        self.returned += 1;
    }

    /// The child is the program from now on, and its pager a new one.
    fn succeed(&mut self, handing: &Handing, mut legacy: Vec<u8>) {
        let plant = self.setup.plant;
        spoil(plant, &mut legacy);
        self.memory.become_child(handing.child);
        let pages = self.store.forget_requests();
        let config = Config { region_pages: PageCount::new(pages), ..self.config.clone() };
        self.former.push(self.engine.counts());
        self.engine = Engine::new(&config, WINDOWS);
        self.heirs += 1;
        let Self { engine, memory, store, .. } = self;
        memory.is_deaf = plant == Plant::HeirForgetsToWake;
        let now = Nanos::new(memory.now);
        let io = &mut Io { memory, store, clock: &move || now };
        let taken = engine.take_over(io, &mut Cursor::new(legacy));
        self.memory.is_deaf = false;
        if let Err(error) = taken {
            self.memory.fail(format!("what was written down cannot be read: {error}"));
        }
    }
}

/// Changes what was written down: see [`Plant`].
fn spoil(plant: Plant, legacy: &mut Vec<u8>) {
    const RANGES: usize = 200;
    const PAGE: usize = 40;
    let number = |legacy: &[u8], at: usize| {
        let bytes = legacy[at..at + 8].try_into().unwrap_or([0; 8]);
        usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(0)
    };
    let ranges = number(legacy, RANGES);
    let pages = RANGES + 8 + ranges * 16;
    match plant {
        Plant::MixesInherited if number(legacy, pages) >= 2 => {
            let first = pages + 8;
            let (one, other) = legacy[first..].split_at_mut(PAGE);
            one[..8].swap_with_slice(&mut other[..8]);
        }
        Plant::ForgetsInheritedRanges => {
            legacy.drain(RANGES + 8..pages);
            legacy[RANGES..RANGES + 8].fill(0);
        }
        _ => {}
    }
}
