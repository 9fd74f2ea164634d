//! Simulated memory, by the rules of the kernel that the pager depends on.
//!
//! The program goes on in the middle of the pager's calls, as on a second processor: each call
//! lets it take a few steps first, now and then.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};

use farmem_pager::{Memory, Registration, SpaceId};
use farmem_region::{Errand, FrameId, Frames, Loan, PAGE_SIZE};
use farmem_vmem::{
    AddressRange, Look, Mapping, MappingKind, PageKind, PresentRun, Progress, Pull, Residents,
    Stop, Uffd,
};

use crate::porter::SimPorter;
use crate::program::{Doing, Model, Then, Thread};
use crate::random::Random;
use crate::run::Plant;
use crate::space::{Page, Report, Space, Vma, pages_of};

/// Threads of the program.
const THREADS: usize = 3;
/// Messages that one read of a userfaultfd returns at most.
const MESSAGES_MAX: usize = 32;

/// The memory of the program and of its children, and the pager's frames.
#[derive(Debug)]
pub struct SimMemory {
    pub(crate) spaces: Vec<Space>,
    pub(crate) models: Vec<Model>,
    pub(crate) threads: Vec<Thread>,
    pub(crate) random: Random,
    pub(crate) now: u64,
    pub(crate) failure: Option<String>,
    /// Ranges that a thread changes, with the space.
    pub(crate) locked: Vec<(usize, AddressRange)>,
    /// Ranges that were being dropped when a space was forked, with the space: they may be either way
    /// there, and in its own children, so nobody ever looks.
    pub(crate) loose: Vec<(usize, AddressRange)>,
    /// Ranges that are being moved away, with the space and where to: who else unmaps what is around them does not
    /// mean them.
    pub(crate) leaving: Vec<(usize, AddressRange, AddressRange)>,
    /// Ranges that were unmapped.
    pub(crate) freed: Vec<(usize, AddressRange)>,
    /// Ranges that parents have changed about the time of a fork, with the child.
    pub(crate) changed: Vec<(usize, AddressRange)>,
    /// The ranges changed last, with the space.
    pub(crate) lately: VecDeque<(usize, AddressRange)>,
    /// One deed in so many is a change of mappings, about.
    pub(crate) steadiness: usize,
    /// How often reading messages has begun or ended.
    pub(crate) readings: u64,
    /// Threads that were dropping pages when the pager began to watch, and at which deed.
    watched: Vec<(usize, u64)>,
    pub(crate) next_address: usize,
    /// Where each thread's sequence of accesses has come.
    pub(crate) sequences: [usize; THREADS],
    /// No more children.
    pub(crate) finishing: bool,
    pub(crate) plant: Plant,
    /// Ranges that a second thread of the pager is to make movable, and those that it has.
    unsharing: VecDeque<AddressRange>,
    unshared: VecDeque<AddressRange>,
    frames: Vec<Option<Box<[u8; PAGE_SIZE]>>>,
    porter: SimPorter,
    /// Children whose fork was read and who have no name yet.
    unnamed: Vec<usize>,
    /// Nobody is woken.
    pub(crate) is_deaf: bool,
}

/// What the pager reads.
#[derive(Debug)]
pub(crate) enum Message {
    Fault { address: usize, write: bool },
    Change(Report),
}

impl SimMemory {
    pub(crate) fn new(seed: u64, frames: usize, plant: Plant) -> Self {
        let mut random = Random::new(seed);
        let steadiness = [400, 60, 20][random.below(3)];
        Self {
            spaces: vec![Space { id: Some(SpaceId::OWN), ..Space::new() }],
            models: vec![Model::new()],
            threads: (0..THREADS).map(|_| Thread::new(0, 0)).collect(),
            random,
            now: 0,
            failure: None,
            locked: Vec::new(),
            loose: Vec::new(),
            leaving: Vec::new(),
            freed: Vec::new(),
            changed: Vec::new(),
            lately: VecDeque::new(),
            steadiness,
            readings: 0,
            watched: Vec::new(),
            next_address: 0,
            sequences: [0; THREADS],
            finishing: false,
            plant,
            unsharing: VecDeque::new(),
            unshared: VecDeque::new(),
            frames: (0..frames).map(|_| None).collect(),
            porter: SimPorter::default(),
            unnamed: Vec::new(),
            is_deaf: false,
        }
    }

    pub(crate) fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    /// Whether a planted defect shows this time.
    pub(crate) fn planted(&mut self, plant: Plant, times: usize) -> bool {
        self.plant == plant && self.random.once_in(times)
    }

    /// The second thread of the pager goes on by one page.
    fn run_errand(&mut self) {
        let Some(&range) = self.unsharing.front() else { return };
        let shared = self.spaces[0].pages.range_mut(range.start()..range.end());
        match shared.map(|(_, page)| page).find(|page| page.shared) {
            Some(page) => page.shared = false,
            None => self.unshared.extend(self.unsharing.pop_front()),
        }
    }

    /// The thread that takes fingerprints goes on, perhaps.
    pub(crate) fn run_porter(&mut self) {
        if self.random.once_in(8) {
            self.porter.run_one();
        }
    }

    fn preempt(&mut self) {
        self.run_errand();
        self.run_porter();
        if self.random.once_in(3) {
            for _ in 0..self.random.below(4) {
                self.run_program();
            }
        }
    }

    fn index(&self, id: SpaceId) -> Option<usize> {
        self.spaces.iter().position(|space| space.id == Some(id) && space.lives)
    }

    /// What a read of the space's userfaultfd returns: faults come before changes, whatever came
    /// first.
    pub(crate) fn read(&mut self, id: SpaceId) -> Vec<Message> {
        let Some(space) = self.index(id) else {
            return Vec::new();
        };
        let mut messages = Vec::new();
        self.readings += 1;
        while messages.len() < MESSAGES_MAX {
            if let Some((address, write, _)) = self.spaces[space].faults.pop_front() {
                messages.push(Message::Fault { address, write });
            } else if let Some((report, thread)) = self.spaces[space].reports.pop_front() {
                if let Doing::Told { then } = self.threads[thread].doing {
                    self.threads[thread].doing = Doing::Heard { then };
                }
                if let Report::Fork(child) = report {
                    self.unnamed.push(child);
                }
                messages.push(Message::Change(report));
                self.run_meanwhile(id);
            } else {
                break;
            }
        }
        self.run_meanwhile(id);
        self.readings += 1;
        messages
    }

    /// Whoever was read of may run before the pager has come back from the kernel. With children the pager
    /// cannot tell then whether what they have dropped was gone when they forked.
    fn run_meanwhile(&mut self, reads: SpaceId) {
        if reads == SpaceId::OWN && self.random.once_in(4) {
            for _ in 0..self.random.below(12) {
                self.run_program();
            }
        }
    }

    /// Fills the missing pages of a range from `value`, up to the first that cannot be filled.
    fn fill(
        &mut self,
        id: SpaceId,
        range: AddressRange,
        mut page: impl FnMut(&Self, usize) -> Page,
    ) -> Progress {
        self.preempt();
        let stopped = |bytes, stop| Progress { bytes, stop: Some(stop) };
        let Some(space) = self.index(id) else {
            return stopped(0, Stop::Gone);
        };
        if self.spaces[space].changing > 0 {
            return stopped(0, Stop::Retry);
        }
        if self.spaces[space].whole(range).is_none_or(|vma| !vma.registered) {
            return stopped(0, Stop::Gone);
        }
        for (at, address) in pages_of(range).enumerate() {
            if self.spaces[space].pages.contains_key(&address) {
                return stopped(at * PAGE_SIZE, Stop::AlreadyThere);
            }
            let page = page(self, at);
            self.spaces[space].pages.insert(address, page);
            if !self.planted(Plant::ForgetsToWake, 500) {
                self.wake_page(space, address);
            }
        }
        Progress { bytes: range.bytes(), stop: None }
    }

    fn wake_page(&mut self, space: usize, page: usize) {
        for thread in self.threads.iter_mut().filter(|thread| thread.space == space) {
            if let Doing::Wait { address, value } = thread.doing
                && address == page
            {
                thread.doing = Doing::Touch { address, value };
            }
        }
    }

    /// Whether a child has not ended.
    pub(crate) fn lives(&self, child: SpaceId) -> bool {
        self.index(child).is_some()
    }

    /// Whether a child is in no fork of its own, whose child would be of neither pager.
    pub(crate) fn may_become(&self, child: SpaceId) -> bool {
        let Some(space) = self.index(child) else {
            return false;
        };
        let forks = |doing: &Doing| {
            matches!(
                doing,
                Doing::Tell { then: Then::Child(_), .. }
                    | Doing::Told { then: Then::Child(_) }
                    | Doing::Heard { then: Then::Child(_) }
            )
        };
        !self.threads.iter().any(|thread| thread.space == space && forks(&thread.doing))
    }

    /// The child becomes the program; its parent and all others are killed. Its pager has frames of
    /// its own.
    pub(crate) fn become_child(&mut self, child: SpaceId) {
        let Some(space) = self.index(child) else { return };
        let Some(thread) = self.threads.iter().position(|thread| thread.space == space) else {
            return;
        };
        let other = |number: usize, of: usize| match number {
            0 => of,
            number if number == of => 0,
            number => number,
        };
        self.spaces.swap(0, space);
        self.models.swap(0, space);
        self.threads.swap(0, thread);
        for thread in &mut self.threads {
            thread.space = other(thread.space, space);
            if thread.space != 0 {
                thread.doing = Doing::Ended;
            }
        }
        for at in 0..self.spaces.len() {
            let space = &mut self.spaces[at];
            space.id = (at == 0).then_some(SpaceId::OWN);
            space.lives = at == 0;
            space.faults.iter_mut().for_each(|fault| fault.2 = other(fault.2, thread));
            space.reports.iter_mut().for_each(|report| report.1 = other(report.1, thread));
        }
        for list in [&mut self.locked, &mut self.loose, &mut self.freed, &mut self.changed] {
            list.iter_mut().for_each(|entry| entry.0 = other(entry.0, space));
            list.retain(|entry| entry.0 == 0);
        }
        self.leaving.iter_mut().for_each(|entry| entry.0 = other(entry.0, space));
        self.leaving.retain(|entry| entry.0 == 0);
        self.lately.clear();
        self.watched.clear();
        self.unsharing.clear();
        self.unshared.clear();
        self.frames.fill(None);
        self.porter.clear();
        let living = self.threads.iter().filter(|thread| thread.space == 0).count();
        self.threads.extend((living..THREADS).map(|_| Thread::new(0, 0)));
    }

    /// What is lent must stay as it is.
    fn assert_free(&self, first: FrameId, count: usize) {
        let frames = (first.get()..).take(count).map(FrameId::new);
        frames.for_each(|frame| assert!(!self.porter.has(frame), "frame {frame} is lent"));
    }

    fn frame_value(&self, frame: usize) -> u64 {
        let bytes = self.frames[frame].as_ref().expect("a present frame");
        u64::from_le_bytes(bytes[..8].try_into().unwrap_or([0; 8]))
    }
}

const fn at(frame: FrameId) -> usize {
    frame.get() as usize
}

fn page_with(value: u64) -> Box<[u8; PAGE_SIZE]> {
    let mut bytes = Box::new([0; PAGE_SIZE]);
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    bytes
}

impl Memory for SimMemory {
    fn copy_in(
        &mut self,
        space: SpaceId,
        target: usize,
        first: FrameId,
        count: usize,
        _pull: Option<Pull>,
    ) -> Progress {
        let range = AddressRange::pages_from(target, count);
        self.fill(space, range, |memory, offset| Page {
            value: memory.frame_value(at(first) + offset),
            zero: false,
            shared: false,
        })
    }

    fn move_in(&mut self, target: usize, first: FrameId, count: usize) -> Progress {
        self.assert_free(first, count);
        let progress = self.copy_in(SpaceId::OWN, target, first, count, None);
        for frame in &mut self.frames[at(first)..at(first) + progress.bytes / PAGE_SIZE] {
            *frame = None;
        }
        progress
    }

    fn move_out(&mut self, source: AddressRange, first: FrameId) -> Progress {
        self.preempt();
        if self.spaces[0].changing > 0 {
            return Progress { bytes: 0, stop: Some(Stop::Retry) };
        }
        if self.spaces[0].whole(source).is_none() {
            return Progress { bytes: 0, stop: Some(Stop::Unmovable) };
        }
        for (offset, address) in pages_of(source).enumerate() {
            let Some(page) = self.spaces[0].pages.get(&address).copied() else {
                continue;
            };
            let stop = if page.shared || page.zero {
                Some(Stop::Busy)
            } else {
                self.frames[at(first) + offset].is_some().then_some(Stop::AlreadyThere)
            };
            if stop.is_some() {
                return Progress { bytes: offset * PAGE_SIZE, stop };
            }
            let lost = self.planted(Plant::LosesMovedPages, 500);
            self.frames[at(first) + offset] = Some(page_with(if lost { 0 } else { page.value }));
            self.spaces[0].pages.remove(&address);
        }
        Progress { bytes: source.bytes(), stop: None }
    }

    fn unshare(&mut self, range: AddressRange) -> bool {
        self.unsharing.push_back(range);
        true
    }

    fn unshared(&mut self) -> Option<AddressRange> {
        self.unshared.pop_front()
    }

    fn await_errand(&mut self) {
        self.porter.run_one();
    }

    fn zero_in(
        &mut self,
        space: SpaceId,
        range: AddressRange,
        written: bool,
        _pull: Option<Pull>,
    ) -> Progress {
        self.fill(space, range, |_, _| Page { value: 0, zero: !written, shared: false })
    }

    fn wake(&mut self, space: SpaceId, range: AddressRange) {
        if let Some(space) = self.index(space).filter(|_| !self.is_deaf) {
            let of_space = |thread: &&Thread| thread.space == space;
            let waits = self.threads.iter().filter(of_space).filter_map(|t| match t.doing {
                Doing::Wait { address, .. } if range.contains(address) => Some(address),
                _ => None,
            });
            let waits: Vec<usize> = waits.collect();
            waits.into_iter().for_each(|page| self.wake_page(space, page));
        }
    }

    fn present(&self, range: AddressRange, each: &mut dyn FnMut(PresentRun)) {
        for (&address, page) in self.spaces[0].pages.range(range.start()..range.end()) {
            let kind = if page.zero { PageKind::Zero } else { PageKind::Page };
            each(PresentRun { range: AddressRange::pages_from(address, 1), kind });
        }
    }

    fn first_present(&self, range: AddressRange) -> Option<usize> {
        let mut inside = self.spaces[0].pages.range(range.start()..range.end());
        inside.next().map(|(&address, _)| address)
    }

    fn find_strays(&mut self, _: FrameId, _: usize, _: &mut dyn FnMut(FrameId)) {}

    fn frame_present(&self, frame: FrameId) -> bool {
        self.frames[at(frame)].is_some()
    }

    fn populate(&mut self, first: FrameId, count: usize) -> usize {
        for frame in &mut self.frames[at(first)..at(first) + count] {
            assert!(frame.replace(page_with(0)).is_none(), "a frame with memory is no hole");
        }
        count
    }

    fn discard(&mut self, first: FrameId, count: usize) {
        self.assert_free(first, count);
        self.frames[at(first)..at(first) + count].fill(None);
    }

    fn look(&mut self, id: SpaceId, address: usize) -> Look {
        self.preempt();
        match self.index(id).map(|space| &self.spaces[space]) {
            None => Look::Ended,
            Some(space) if space.changing > 0 => Look::Changing,
            Some(space) if space.vma(address).is_some_and(|vma| vma.registered) => Look::Registered,
            Some(_) => Look::Nothing,
        }
    }

    fn watch_removers(&mut self) {
        let inside = self.threads.iter().enumerate().filter(|(_, thread)| thread.is_dropping());
        self.watched = inside.map(|(at, thread)| (at, thread.deeds)).collect();
    }

    fn removers_are_done(&mut self) -> bool {
        let Self { watched, threads, .. } = self;
        watched.retain(|&(at, deeds)| threads[at].is_dropping() && threads[at].deeds == deeds);
        watched.is_empty()
    }

    fn readings(&self) -> u64 {
        self.readings
    }

    fn readings_at_fork(&mut self, child: SpaceId, _thread: u32) -> Option<u64> {
        self.index(child).map(|space| self.spaces[space].readings_at_birth)
    }

    fn register(&mut self, range: AddressRange) -> Registration {
        let vmas = std::mem::take(&mut self.spaces[0].vmas);
        let mut registered = false;
        for vma in vmas {
            let inside = vma.range.intersect(range);
            registered |= !inside.is_empty();
            let outside = vma.range.without(range).into_iter().filter(|part| !part.is_empty());
            self.spaces[0].vmas.extend(outside.map(|part| Vma { range: part, ..vma }));
            if !inside.is_empty() {
                self.spaces[0].vmas.push(Vma { range: inside, registered: true });
            }
        }
        if registered { Registration::Done } else { Registration::Refused }
    }

    fn registered(
        &mut self,
        ranges: &[AddressRange],
        each: &mut dyn FnMut(AddressRange),
    ) -> io::Result<()> {
        let vmas = self.spaces[0].vmas.iter().filter(|vma| vma.registered);
        let parts = vmas.flat_map(|vma| ranges.iter().map(|range| range.intersect(vma.range)));
        parts.filter(|part| !part.is_empty()).for_each(each);
        Ok(())
    }

    fn mappings(&mut self, each: &mut dyn FnMut(Mapping)) -> io::Result<()> {
        let mut ranges: Vec<AddressRange> =
            self.spaces[0].vmas.iter().map(|vma| vma.range).collect();
        ranges.sort_unstable();
        for range in ranges {
            each(Mapping { range, kind: MappingKind::PrivateAnonymous });
        }
        Ok(())
    }

    fn owned(&self, _each: &mut dyn FnMut(AddressRange)) {}

    fn control_blocks(&mut self, _each: &mut dyn FnMut(AddressRange)) {}

    fn resident(&self) -> Residents {
        let pages = self.spaces[0].pages.values().filter(|page| !page.zero).count();
        let frames = self.frames.iter().filter(|frame| frame.is_some()).count();
        Residents { anonymous: pages + frames, shared: 0 }
    }

    fn resident_of(&self, _thread: u32) -> Option<usize> {
        None
    }

    fn add_space(&mut self, id: SpaceId, _uffd: Uffd) {
        if self.unnamed.is_empty() {
            self.fail("a child was named that was not reported".to_owned());
            return;
        }
        let child = self.unnamed.remove(0);
        self.spaces[child].id = Some(id);
    }

    fn remove_space(&mut self, id: SpaceId) {
        let removed = self.spaces.iter_mut().find(|space| space.id == Some(id));
        if let Some(space) = removed {
            space.id = None;
        }
    }

    fn space_lives(&mut self, id: SpaceId) -> bool {
        self.index(id).is_some()
    }
}

impl Frames for SimMemory {
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE] {
        self.frames[at(frame)].as_ref().expect("only frames with memory are read")
    }

    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE] {
        self.assert_free(frame, 1);
        self.frames[at(frame)].as_mut().expect("only frames with memory are written")
    }

    fn gather_mut<'a>(&'a mut self, _frames: &[FrameId], _slices: &mut Vec<IoSliceMut<'a>>) {
        unreachable!("the simulated store takes frames one by one")
    }

    fn gather<'a>(&'a self, _frames: &[FrameId], _slices: &mut Vec<IoSlice<'a>>) {
        unreachable!("the simulated store takes frames one by one")
    }

    fn would_lend(&self, loan: Loan) -> bool {
        loan == Loan::Read
    }

    fn lend(
        &mut self,
        frames: &[FrameId],
        loan: Loan,
        errand: Box<dyn Errand>,
    ) -> Result<(), Box<dyn Errand>> {
        // Now and then there is no thread for it.
        if loan != Loan::Read || self.random.once_in(16) {
            return Err(errand);
        }
        let pages = frames.iter().map(|&frame| Box::new(*self.bytes(frame))).collect();
        self.porter.take(errand, frames, pages);
        Ok(())
    }
}
