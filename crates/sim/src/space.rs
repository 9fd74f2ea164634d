//! One simulated address space: mappings, pages, and what its userfaultfd has to report.

use std::collections::{BTreeMap, VecDeque};

use farmem_pager::SpaceId;
use farmem_region::PAGE_SIZE;
use farmem_vmem::AddressRange;

/// A page that is there. Contents are numbers: 0 is a page of zeros.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page {
    pub(crate) value: u64,
    /// The kernel's shared zero page, which costs no memory.
    pub(crate) zero: bool,
    /// Shared with a forked child, so that it cannot be moved.
    pub(crate) shared: bool,
}

/// A mapping of private anonymous memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vma {
    pub(crate) range: AddressRange,
    pub(crate) registered: bool,
}

/// A change of mappings, to be reported.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Report {
    /// To this space.
    Fork(usize),
    Remap {
        from: AddressRange,
        to: usize,
    },
    Remove(AddressRange),
    Unmap(AddressRange),
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Space {
    /// Its name at the pager, once that knows it.
    pub(crate) id: Option<SpaceId>,
    pub(crate) vmas: Vec<Vma>,
    pub(crate) pages: BTreeMap<usize, Page>,
    /// Addresses and whether to write, with the thread.
    pub(crate) faults: VecDeque<(usize, bool, usize)>,
    /// Reports, with the thread that waits for its being read.
    pub(crate) reports: VecDeque<(Report, usize)>,
    /// Changes of mappings from their beginning until who makes them goes on.
    pub(crate) changing: u32,
    pub(crate) lives: bool,
    /// How often messages had been read when it was forked.
    pub(crate) readings_at_birth: u64,
}

impl Space {
    pub(crate) const fn new() -> Self {
        Self {
            id: None,
            vmas: Vec::new(),
            pages: BTreeMap::new(),
            faults: VecDeque::new(),
            reports: VecDeque::new(),
            changing: 0,
            lives: true,
            readings_at_birth: 0,
        }
    }

    pub(crate) fn vma(&self, address: usize) -> Option<Vma> {
        self.vmas.iter().copied().find(|vma| vma.range.contains(address))
    }

    /// The mapping that a call on `range` concerns: the kernel wants it to hold all of it.
    pub(crate) fn whole(&self, range: AddressRange) -> Option<Vma> {
        self.vma(range.start()).filter(|vma| range.end() <= vma.range.end())
    }

    /// Takes a range out of the mappings.
    pub(crate) fn cut(&mut self, range: AddressRange) {
        let mut kept = Vec::new();
        for vma in self.vmas.drain(..) {
            let parts = vma.range.without(range).into_iter().filter(|part| !part.is_empty());
            kept.extend(parts.map(|part| Vma { range: part, ..vma }));
        }
        self.vmas = kept;
    }

    pub(crate) fn take_pages(&mut self, range: AddressRange) -> Vec<(usize, Page)> {
        let inside: Vec<usize> =
            self.pages.range(range.start()..range.end()).map(|(&address, _)| address).collect();
        inside
            .into_iter()
            .filter_map(|address| Some((address, self.pages.remove(&address)?)))
            .collect()
    }
}

/// The addresses of a range's pages.
pub(crate) fn pages_of(range: AddressRange) -> impl Iterator<Item = usize> {
    (range.start()..range.end()).step_by(PAGE_SIZE)
}
