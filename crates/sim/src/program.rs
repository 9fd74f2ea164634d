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
/// Changes that a child is interested in which its parent made before the fork.
const LATELY_MAX: usize = 3;
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
    /// What it has decided to do so far.
    pub(crate) deeds: u64,
}

impl Thread {
    pub(crate) const fn new(space: usize, left: usize) -> Self {
        Self { space, doing: Doing::Nothing, since: 0, left, deeds: 0 }
    }

    /// Whether its announced removal has been read and the pages are still there.
    pub(crate) const fn is_dropping(&self) -> bool {
        matches!(self.doing, Doing::Heard { then: Then::Drop(_) } | Doing::Drop(_))
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
            // On its way out of the kernel a fork copies much: others may overtake it.
            Doing::Tell { report: Report::Fork(_), .. } if !self.random.once_in(6) => {}
            // Freed addresses may be in use before it is told that they were unmapped.
            Doing::Tell { report: Report::Unmap(_), .. } if !self.random.once_in(6) => {}
            Doing::Tell { report, then } => {
                let space = self.threads[thread].space;
                self.spaces[space].reports.push_back((report, thread));
                self.threads[thread].doing = Doing::Told { then };
            }
            Doing::Heard { then } => self.go_on(thread, then),
            Doing::Drop(range) => self.drop_now(thread, range),
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
        self.threads[thread].deeds += 1;
        if self.threads[thread].space != 0 {
            let left = self.threads[thread].left;
            if left == 0 {
                self.end_child(thread);
                return;
            }
            self.threads[thread].left -= 1;
        }
        match self.random.below(self.steadiness) {
            0 => self.drop_pages(thread),
            1 => self.unmap(thread),
            2 | 3 => self.map(),
            4 if self.random.once_in(3) => self.grow(thread),
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
        } else if space != 0 && self.random.once_in(2) {
            self.some_changed_page(space)
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

    /// A page that the parent has changed about the time of the fork.
    fn some_changed_page(&mut self, space: usize) -> Option<usize> {
        let ranges: Vec<_> = self.changed.iter().filter(|(child, _)| *child == space).collect();
        if ranges.is_empty() {
            return None;
        }
        let &(_, range) = ranges[self.random.below(ranges.len())];
        let address = range.start() + self.random.below(range.pages()) * PAGE_SIZE;
        self.spaces[space].vma(address).map(|_| address)
    }

    /// A range of a space changes: children that are being made may look there.
    fn note_change(&mut self, space: usize, range: AddressRange) {
        let of_space = self.threads.iter().filter(|thread| thread.space == space);
        let children = of_space.filter_map(|thread| match thread.doing {
            Doing::Tell { then: Then::Child(child), .. }
            | Doing::Told { then: Then::Child(child) } => Some((child, range)),
            _ => None,
        });
        let children: Vec<_> = children.collect();
        self.changed.extend(children);
        self.lately.push_back((space, range));
        if self.lately.len() > LATELY_MAX {
            self.lately.pop_front();
        }
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

    /// A range inside one mapping that nobody uses, locked.
    fn lock_some(&mut self, space: usize, whole: bool) -> Option<AddressRange> {
        let address = self.some_page(space)?;
        let vma = self.spaces[space].vma(address)?.range;
        let pages = (1 + self.random.below(60)).min((vma.end() - address) / PAGE_SIZE);
        self.lock(space, if whole { vma } else { AddressRange::pages_from(address, pages) })
    }

    /// A range that may reach over several mappings, registered or not, and over what lies between.
    fn lock_wide(&mut self, space: usize) -> Option<AddressRange> {
        let address = self.some_page(space)?;
        let before = self.random.below(100) * PAGE_SIZE;
        let start = address.saturating_sub(before).max(FIRST_ADDRESS);
        let end = address + (1 + self.random.below(200)) * PAGE_SIZE;
        let range = AddressRange::new(start, end);
        let mut leaving = self.leaving.iter().filter(|(other, ..)| *other == space);
        if leaving.any(|(_, from, _)| from.overlaps(range)) {
            return None;
        }
        self.lock(space, range)
    }

    fn lock(&mut self, space: usize, range: AddressRange) -> Option<AddressRange> {
        let mut closed = self.locked.iter().chain(&self.loose);
        let locked = closed.any(|&(other, locked)| other == space && locked.overlaps(range));
        let used = self.threads.iter().any(|thread| match thread.doing {
            Doing::Touch { address, .. } | Doing::Wait { address, .. } => {
                thread.space == space && range.contains(address)
            }
            _ => false,
        });
        if locked || used {
            return None;
        }
        self.locked.push((space, range));
        Some(range)
    }

    /// Whether nobody may look there.
    pub(crate) fn is_locked(&self, space: usize, address: usize) -> bool {
        let mut closed = self.locked.iter().chain(&self.loose);
        closed.any(|&(other, range)| other == space && range.contains(address))
    }

    fn unlock(&mut self, thread: usize, range: AddressRange) {
        let space = self.threads[thread].space;
        self.locked.retain(|&other| other != (space, range));
        self.leaving.retain(|&(other, _, to)| (other, to) != (space, range));
        self.threads[thread].doing = Doing::Nothing;
    }

    fn is_registered(&self, space: usize, range: AddressRange) -> bool {
        self.spaces[space].vmas.iter().any(|vma| vma.registered && vma.range.overlaps(range))
    }

    fn drop_pages(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        let Some(range) = self.lock_some(space, false) else {
            return;
        };
        if !self.is_registered(space, range) || self.planted(Plant::ForgetsDrops, 1) {
            // The kernel lets nobody register the range meanwhile.
            self.drop_now(thread, range);
            return;
        }
        self.note_change(space, range);
        self.spaces[space].changing += 1;
        let then = Then::Drop(range);
        self.threads[thread].doing = Doing::Tell { report: Report::Remove(range), then };
    }

    fn drop_now(&mut self, thread: usize, range: AddressRange) {
        let space = self.threads[thread].space;
        let _ = self.spaces[space].take_pages(range);
        self.models[space].retain(|address, _| !range.contains(*address));
        self.unlock(thread, range);
    }

    fn unmap(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        let mapped: usize = self.spaces[space].vmas.iter().map(|vma| vma.range.pages()).sum();
        if mapped < PAGES_MAX / 2 {
            return;
        }
        let locked = match self.random.below(4) {
            0 => self.lock_some(space, true),
            1 => self.lock_some(space, false),
            _ => self.lock_wide(space),
        };
        let Some(range) = locked else {
            return;
        };
        self.note_change(space, range);
        let registered = self.is_registered(space, range);
        let mapped = self.spaces[space].vmas.iter().map(|vma| vma.range.intersect(range));
        let mapped = mapped.filter(|part| !part.is_empty()).map(|part| (space, part));
        self.freed.extend(mapped.collect::<Vec<_>>());
        self.spaces[space].cut(range);
        let _ = self.spaces[space].take_pages(range);
        self.models[space].retain(|address, _| !range.contains(*address));
        self.unlock(thread, range);
        if registered {
            self.spaces[space].changing += 1;
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
        let range = self.place(0, pages);
        self.spaces[0].vmas.push(Vma { range, registered: false });
    }

    fn place(&mut self, space: usize, pages: usize) -> AddressRange {
        let fits =
            |(other, range): &(usize, AddressRange)| *other == space && range.pages() >= pages;
        let reusable = self.freed.iter().position(fits).filter(|_| self.random.once_in(2));
        if let Some(at) = reusable {
            let (_, range) = self.freed.swap_remove(at);
            return AddressRange::pages_from(range.start(), pages);
        }
        let start = self.next_address.max(FIRST_ADDRESS);
        // Sometimes right behind the mapping before.
        let gap = self.random.below(3) * 7 * PAGE_SIZE;
        self.next_address = start + pages * PAGE_SIZE + gap;
        AddressRange::pages_from(start, pages)
    }

    fn remap(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        let Some(from) = self.lock_some(space, true) else {
            return;
        };
        let Some(vma) = self.spaces[space].vma(from.start()) else {
            return;
        };
        let to = self.place(space, from.pages());
        self.note_change(space, from);
        self.note_change(space, to);
        self.spaces[space].cut(from);
        self.spaces[space].vmas.push(Vma { range: to, ..vma });
        for (address, page) in self.spaces[space].take_pages(from) {
            self.spaces[space].pages.insert(to.start() + (address - from.start()), page);
        }
        let model = &mut self.models[space];
        let moved: Vec<_> =
            model.range(from.start()..from.end()).map(|(&at, &value)| (at, value)).collect();
        for (address, value) in moved {
            model.remove(&address);
            model.insert(to.start() + (address - from.start()), value);
        }
        self.freed.push((space, from));
        if !vma.registered {
            self.unlock(thread, from);
            return;
        }
        // The new place stays locked until the change is known.
        self.locked.retain(|&other| other != (space, from));
        self.locked.push((space, to));
        self.leaving.push((space, from, to));
        if self.planted(Plant::ForgetsMoves, 1) {
            self.unlock(thread, to);
            return;
        }
        self.spaces[space].changing += 2;
        let report = Report::Remap { from, to: to.start() };
        self.threads[thread].doing = Doing::Tell { report, then: Then::Unmap { from, to } };
    }

    /// A mapping becomes larger where it is: mremap does not report that.
    fn grow(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        let Some(vma) = self.some_page(space).and_then(|page| self.spaces[space].vma(page)) else {
            return;
        };
        let more = AddressRange::pages_from(vma.range.end(), 1 + self.random.below(60));
        let mapped: usize = self.spaces[space].vmas.iter().map(|vma| vma.range.pages()).sum();
        let is_taken = self.spaces[space].vmas.iter().any(|vma| vma.range.overlaps(more));
        let mut closed = self.locked.iter().chain(&self.loose);
        let is_closed = closed.any(|&(other, range)| other == space && range.overlaps(more));
        if mapped + more.pages() > PAGES_MAX || is_taken || is_closed {
            return;
        }
        self.next_address = self.next_address.max(more.end());
        self.freed.retain(|&(other, range)| other != space || !range.overlaps(more));
        for at in &mut self.spaces[space].vmas {
            if at.range == vma.range {
                at.range = AddressRange::new(vma.range.start(), more.end());
            }
        }
    }

    /// The ranges of a space whose contents may go at any moment: a drop of them is announced.
    fn vanishing(&self, space: usize) -> Vec<AddressRange> {
        let of_space = self.threads.iter().filter(|thread| thread.space == space);
        let drops = of_space.filter_map(|thread| match thread.doing {
            Doing::Tell { then: Then::Drop(range), .. }
            | Doing::Told { then: Then::Drop(range) }
            | Doing::Heard { then: Then::Drop(range) }
            | Doing::Drop(range) => Some(range),
            _ => None,
        });
        drops.collect()
    }

    fn fork(&mut self, thread: usize) {
        if self.spaces.iter().skip(1).filter(|space| space.lives).count() >= CHILDREN_MAX {
            return;
        }
        let parent = self.threads[thread].space;
        let mut child = Space::new();
        child.readings_at_birth = self.spaces[parent].readings_at_birth;
        if parent == 0 {
            child.readings_at_birth = self.readings;
        }
        child.vmas.clone_from(&self.spaces[parent].vmas);
        for page in self.spaces[parent].pages.values_mut() {
            page.shared = true;
        }
        child.pages.clone_from(&self.spaces[parent].pages);
        let number = self.spaces.len();
        // What is being dropped at this moment may be either way in the child: it never looks.
        let mut loose = self.vanishing(parent);
        let of_parent = |(space, _): &&(usize, AddressRange)| *space == parent;
        loose.extend(self.loose.iter().filter(of_parent).map(|&(_, range)| range));
        if parent != 0 {
            loose.extend(self.locked.iter().filter(of_parent).map(|&(_, range)| range));
        }
        self.loose.extend(loose.into_iter().map(|range| (number, range)));
        let freed: Vec<_> = self.freed.iter().filter(of_parent).map(|f| (number, f.1)).collect();
        self.freed.extend(freed);
        let lately = self.lately.iter().filter(|(space, _)| *space == parent);
        self.changed.extend(lately.map(|&(_, range)| (number, range)));
        self.spaces.push(child);
        self.models.push(self.models[parent].clone());
        self.spaces[parent].changing += 1;
        let child = number;
        let then = Then::Child(child);
        self.threads[thread].doing = Doing::Tell { report: Report::Fork(child), then };
    }

    fn end_child(&mut self, thread: usize) {
        let space = self.threads[thread].space;
        self.threads[thread].doing = Doing::Ended;
        self.spaces[space].lives = false;
        self.spaces[space].pages.clear();
        self.freed.retain(|&(other, _)| other != space);
        self.locked.retain(|&(other, _)| other != space);
        self.loose.retain(|&(other, _)| other != space);
        self.leaving.retain(|&(other, ..)| other != space);
        self.changed.retain(|&(other, _)| other != space);
    }

    /// The report has been read: the change is over, as far as the kernel is concerned.
    fn go_on(&mut self, thread: usize, then: Then) {
        let space = self.threads[thread].space;
        self.spaces[space].changing -= 1;
        match then {
            Then::Unlock(range) => self.unlock(thread, range),
            Then::Drop(range) => self.threads[thread].doing = Doing::Drop(range),
            Then::Unmap { from, to } => {
                let then = Then::Unlock(to);
                self.threads[thread].doing = Doing::Tell { report: Report::Unmap(from), then };
            }
            Then::Child(child) => {
                let left = 50 + self.random.below(400);
                self.threads.push(Thread::new(child, left));
                self.threads[thread].doing = Doing::Nothing;
            }
        }
    }
}
