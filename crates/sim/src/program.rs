//! The random program: its threads, what they do, and what they expect to find.
//!
//! The program is well-behaved: while a thread changes a range of mappings no other thread uses
//! that range. Everything else happens at any time, also in the middle of the pager's work.

use std::collections::BTreeMap;

use farmem_region::PAGE_SIZE;
use farmem_vmem::AddressRange;

use crate::memory::SimMemory;
use crate::run::Plant;
use crate::space::{Page, Report, Space, Vma};

/// Pages of one mapping at most.
const MAPPING_PAGES_MAX: usize = 300;
/// Pages that the program maps at most.
pub(crate) const PAGES_MAX: usize = 3000;
/// Children at one time.
const CHILDREN_MAX: usize = 2;
/// Where the program's mappings begin.
const FIRST_ADDRESS: usize = 0x1000_0000;

/// What a thread is doing.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Doing {
    /// It decides what to do next.
    Nothing,
    /// It is about to touch a page; with a value it stores that.
    Touch { address: usize, value: Option<u64> },
    /// It waits for the page.
    Wait { address: usize, value: Option<u64> },
    /// It has changed mappings and is about to report it.
    Tell { report: Report, then: Then },
    /// It waits until its report is read.
    Told { then: Then },
    /// Its report was read.
    Heard { then: Then },
    /// It is about to drop pages, which it has announced.
    Drop(AddressRange),
    /// It has ended.
    Ended,
}

/// What comes after a report.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Then {
    /// The range is usable again.
    Unlock(AddressRange),
    Drop(AddressRange),
    /// The second report of a move, with the range to unlock afterwards.
    Unmap {
        from: AddressRange,
        to: AddressRange,
    },
    Child(usize),
}

#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) space: usize,
    pub(crate) doing: Doing,
    /// When it last went on.
    pub(crate) since: u64,
    /// Accesses left, for a child.
    left: usize,
}

impl Thread {
    pub(crate) const fn new(space: usize, left: usize) -> Self {
        Self { space, doing: Doing::Nothing, since: 0, left }
    }

    pub(crate) const fn can_run(&self) -> bool {
        !matches!(self.doing, Doing::Wait { .. } | Doing::Told { .. } | Doing::Ended)
    }
}

/// What a space must contain: pages that are not here are zero.
pub(crate) type Model = BTreeMap<usize, u64>;

impl SimMemory {
    /// Lets one thread that can run take one step.
    pub(crate) fn run_program(&mut self) -> bool {
        let able: Vec<usize> = (0..self.threads.len()).filter(|&at| self.may_run(at)).collect();
        if able.is_empty() || self.failure.is_some() {
            return false;
        }
        let thread = able[self.random.below(able.len())];
        self.threads[thread].since = self.now;
        match self.threads[thread].doing {
            Doing::Nothing => self.decide(thread),
            Doing::Touch { address, value } => self.touch(thread, address, value),
            Doing::Tell { report, then } => {
                let space = self.threads[thread].space;
                self.spaces[space].reports.push_back((report, thread));
                self.threads[thread].doing = Doing::Told { then };
            }
            Doing::Heard { then } => self.go_on(thread, then),
            Doing::Drop(range) => {
                let space = self.threads[thread].space;
                let _ = self.spaces[space].take_pages(range);
                self.models[space].retain(|address, _| !range.contains(*address));
                self.unlock(thread, range);
            }
            Doing::Wait { .. } | Doing::Told { .. } | Doing::Ended => {}
        }
        true
    }

    fn may_run(&self, thread: usize) -> bool {
        let thread = &self.threads[thread];
        let idle = matches!(thread.doing, Doing::Nothing);
        thread.can_run() && !(self.finishing && idle && thread.space == 0)
    }

    fn decide(&mut self, thread: usize) {
        if self.threads[thread].space != 0 {
            let left = self.threads[thread].left;
            if left == 0 {
                self.end_child(thread);
                return;
            }
            self.threads[thread].left -= 1;
            self.access(thread);
            return;
        }
        match self.random.below(400) {
            0 => self.drop_pages(thread),
            1 => self.unmap(thread),
            2 | 3 => self.map(),
            4 => self.remap(thread),
            5 if !self.finishing => self.fork(thread),
            _ => self.access(thread),
        }
    }

    /// Begins an access: to the next page of the thread's sequence, or to a random one.
    fn access(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        let next = self.sequences[thread % self.sequences.len()] + PAGE_SIZE;
        let address = if self.random.once_in(4) {
            self.some_page(space)
        } else {
            self.spaces[space].vma(next).map(|_| next).or_else(|| self.some_page(space))
        };
        let Some(address) = address.filter(|&address| !self.is_locked(space, address)) else {
            return;
        };
        let at = thread % self.sequences.len();
        self.sequences[at] = address;
        let value = match self.random.below(8) {
            0 => Some(0),
            1 | 2 => Some(self.random.next()),
            _ => None,
        };
        self.threads[thread].doing = Doing::Touch { address, value };
    }

    fn some_page(&mut self, space: usize) -> Option<usize> {
        let vmas = self.spaces[space].vmas.len();
        if vmas == 0 {
            return None;
        }
        let range = self.spaces[space].vmas[self.random.below(vmas)].range;
        Some(range.start() + self.random.below(range.pages()) * PAGE_SIZE)
    }

    fn touch(&mut self, thread: usize, address: usize, value: Option<u64>) {
        let space = self.threads[thread].space;
        let Some(vma) = self.spaces[space].vma(address) else {
            // Unmapped before it got there.
            self.threads[thread].doing = Doing::Nothing;
            return;
        };
        if !self.spaces[space].pages.contains_key(&address) {
            if vma.registered {
                let fault = (address, value.is_some(), thread);
                self.spaces[space].faults.push_back(fault);
                self.threads[thread].doing = Doing::Wait { address, value };
                return;
            }
            let page = Page { value: 0, zero: value.is_none(), shared: false };
            self.spaces[space].pages.insert(address, page);
        }
        let Some(page) = self.spaces[space].pages.get_mut(&address) else {
            return;
        };
        let expected = self.models[space].get(&address).copied().unwrap_or(0);
        if page.value != expected {
            let found = page.value;
            self.fail(format!(
                "R1: space {space}, page {address:#x}: read {found:#x}, stored was {expected:#x}"
            ));
            return;
        }
        if let Some(value) = value {
            *page = Page { value, zero: false, shared: false };
            self.models[space].insert(address, value);
        }
        self.threads[thread].doing = Doing::Nothing;
    }

    /// A range inside one mapping that nobody uses, locked for the thread.
    fn lock_some(&mut self, whole: bool) -> Option<AddressRange> {
        let address = self.some_page(0)?;
        let vma = self.spaces[0].vma(address)?.range;
        let pages = (1 + self.random.below(60)).min((vma.end() - address) / PAGE_SIZE);
        let range = if whole { vma } else { AddressRange::pages_from(address, pages) };
        let locked = self.locked.iter().any(|other| other.overlaps(range));
        let used = self.threads.iter().any(|thread| match thread.doing {
            Doing::Touch { address, .. } | Doing::Wait { address, .. } => {
                thread.space == 0 && range.contains(address)
            }
            _ => false,
        });
        if locked || used {
            return None;
        }
        self.locked.push(range);
        Some(range)
    }

    fn is_locked(&self, space: usize, address: usize) -> bool {
        space == 0 && self.locked.iter().any(|range| range.contains(address))
    }

    fn unlock(&mut self, thread: usize, range: AddressRange) {
        self.locked.retain(|other| *other != range);
        self.threads[thread].doing = Doing::Nothing;
    }

    fn is_registered(&self, range: AddressRange) -> bool {
        self.spaces[0].vmas.iter().any(|vma| vma.registered && vma.range.overlaps(range))
    }

    fn drop_pages(&mut self, thread: usize) {
        let Some(range) = self.lock_some(false) else {
            return;
        };
        if !self.is_registered(range) || self.planted(Plant::ForgetsDrops, 1) {
            self.threads[thread].doing = Doing::Drop(range);
            return;
        }
        self.spaces[0].changing += 1;
        let then = Then::Drop(range);
        self.threads[thread].doing = Doing::Tell { report: Report::Remove(range), then };
    }

    fn unmap(&mut self, thread: usize) {
        let mapped: usize = self.spaces[0].vmas.iter().map(|vma| vma.range.pages()).sum();
        if mapped < PAGES_MAX / 2 {
            return;
        }
        let whole = self.random.once_in(2);
        let Some(range) = self.lock_some(whole) else {
            return;
        };
        let registered = self.is_registered(range);
        self.spaces[0].cut(range);
        let _ = self.spaces[0].take_pages(range);
        self.models[0].retain(|address, _| !range.contains(*address));
        self.freed.push(range);
        self.unlock(thread, range);
        if registered {
            self.spaces[0].changing += 1;
            let then = Then::Unlock(AddressRange::pages_from(0, 0));
            self.threads[thread].doing = Doing::Tell { report: Report::Unmap(range), then };
        }
    }

    /// Maps fresh memory, often where some was unmapped.
    pub(crate) fn map(&mut self) {
        let mapped: usize = self.spaces[0].vmas.iter().map(|vma| vma.range.pages()).sum();
        let pages = 1 + self.random.below(MAPPING_PAGES_MAX);
        if mapped + pages > PAGES_MAX {
            return;
        }
        let range = self.place(pages);
        self.spaces[0].vmas.push(Vma { range, registered: false });
    }

    fn place(&mut self, pages: usize) -> AddressRange {
        let fits = |range: &AddressRange| range.pages() >= pages;
        let reusable = self.freed.iter().position(fits).filter(|_| self.random.once_in(2));
        if let Some(at) = reusable {
            let range = self.freed.swap_remove(at);
            return AddressRange::pages_from(range.start(), pages);
        }
        let start = self.next_address.max(FIRST_ADDRESS);
        // Sometimes right behind the mapping before.
        let gap = self.random.below(3) * 7 * PAGE_SIZE;
        self.next_address = start + pages * PAGE_SIZE + gap;
        AddressRange::pages_from(start, pages)
    }

    fn remap(&mut self, thread: usize) {
        let Some(from) = self.lock_some(true) else {
            return;
        };
        let Some(vma) = self.spaces[0].vma(from.start()) else {
            return;
        };
        let to = self.place(from.pages());
        self.spaces[0].cut(from);
        self.spaces[0].vmas.push(Vma { range: to, ..vma });
        for (address, page) in self.spaces[0].take_pages(from) {
            self.spaces[0].pages.insert(to.start() + (address - from.start()), page);
        }
        let model = &mut self.models[0];
        let moved: Vec<_> =
            model.range(from.start()..from.end()).map(|(&at, &value)| (at, value)).collect();
        for (address, value) in moved {
            model.remove(&address);
            model.insert(to.start() + (address - from.start()), value);
        }
        self.freed.push(from);
        if !vma.registered {
            self.unlock(thread, from);
            return;
        }
        // The new place stays locked until the change is known.
        self.locked.retain(|other| *other != from);
        self.locked.push(to);
        if self.planted(Plant::ForgetsMoves, 1) {
            self.unlock(thread, to);
            return;
        }
        self.spaces[0].changing += 2;
        let report = Report::Remap { from, to: to.start() };
        self.threads[thread].doing = Doing::Tell { report, then: Then::Unmap { from, to } };
    }

    fn fork(&mut self, thread: usize) {
        if self.spaces.iter().skip(1).filter(|space| space.lives).count() >= CHILDREN_MAX {
            return;
        }
        // What is being changed at this moment may be either way in the child: it has none of it.
        let mut child = Space::new();
        child.vmas.clone_from(&self.spaces[0].vmas);
        for page in self.spaces[0].pages.values_mut() {
            page.shared = true;
        }
        child.pages.clone_from(&self.spaces[0].pages);
        let mut model = self.models[0].clone();
        for &range in &self.locked {
            child.cut(range);
            let _ = child.take_pages(range);
            model.retain(|address, _| !range.contains(*address));
        }
        self.spaces.push(child);
        self.models.push(model);
        self.spaces[0].changing += 1;
        let child = self.spaces.len() - 1;
        let then = Then::Child(child);
        self.threads[thread].doing = Doing::Tell { report: Report::Fork(child), then };
    }

    fn end_child(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        self.threads[thread].doing = Doing::Ended;
        self.spaces[space].lives = false;
        self.spaces[space].pages.clear();
        let others = self.spaces.iter().skip(1).any(|space| space.lives);
        if !others {
            self.spaces[0].pages.values_mut().for_each(|page| page.shared = false);
        }
    }

    /// The report has been read: the change is over, as far as the kernel is concerned.
    fn go_on(&mut self, thread: usize, then: Then) {
        self.spaces[0].changing -= 1;
        match then {
            Then::Unlock(range) => self.unlock(thread, range),
            Then::Drop(range) => self.threads[thread].doing = Doing::Drop(range),
            Then::Unmap { from, to } => {
                let then = Then::Unlock(to);
                self.threads[thread].doing = Doing::Tell { report: Report::Unmap(from), then };
            }
            Then::Child(space) => {
                let left = 50 + self.random.below(400);
                self.threads.push(Thread::new(space, left));
                self.threads[thread].doing = Doing::Nothing;
            }
        }
    }
}
