//! From what a journal says to the tables that it speaks of.

use std::collections::{BTreeMap, HashMap};

use farmem_region::{PageRange, RegionId};

use super::record::{FileIdentity, NotARecord, OwnRecord, RECORD_BYTES_MAX, Record, SessionRecord};
use crate::page_set::PageSet;
use crate::prefer::Preferences;
use crate::table::{Portion, Table};
use crate::tiers::Tiers;
use crate::working_set::WorkingSet;

/// Pages of the largest region that a journal may speak of, 1 PiB: four times what all blocks of a
/// server hold. Memory for a table's root is taken for the pages that are stored in it.
const PAGES_MAX: u64 = 1 << 38;

/// What a former process knew.
#[derive(Debug, Default)]
pub(crate) struct Past {
    pub(crate) sessions: BTreeMap<RegionId, PastSession>,
    pub(crate) shelves: HashMap<u32, Shelved>,
    /// Ids below may have been used.
    pub(crate) next_session: u64,
    /// Bytes of records that were read.
    pub(crate) end: usize,
    /// Whether the last thing that happened is that the server was stopped in order.
    pub(crate) was_stopped: bool,
}

/// A session of it.
#[derive(Debug)]
pub(crate) struct PastSession {
    pub(crate) about: About,
    pub(crate) blocks: Vec<u32>,
    pub(crate) pins: PageSet,
    pub(crate) prefers: Preferences,
    /// The region that it counts as a copy of.
    pub(crate) parent: Option<RegionId>,
    pub(crate) table: Table,
    pub(crate) working_set: WorkingSet,
}

/// As [`SessionRecord`], with texts of its own.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) record: SessionRecord<'static>,
    pub(crate) name: String,
    pub(crate) path: String,
    /// The range of its own that a clone has, if that is not filled.
    pub(crate) own: Option<OwnAbout>,
}

/// As [`OwnRecord`], with a text of its own.
#[derive(Debug)]
pub(crate) struct OwnAbout {
    pub(crate) path: String,
    pub(crate) offset: u64,
    pub(crate) identity: FileIdentity,
}

/// A shelf as it was built last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shelved {
    pub(crate) class: u8,
    pub(crate) slots: [u32; 8],
    pub(crate) count: u8,
}

/// Reads all records. The tables' tokens are not counted yet.
///
/// # Errors
/// If a record is damaged or contradicts those before it: then nothing of it is to be believed.
pub(crate) fn replay(records: &[u8], tiers: &Tiers) -> Result<Past, String> {
    let mut past = Past::default();
    loop {
        let rest = &records[past.end..];
        match Record::decode(rest) {
            Ok((record, bytes)) => {
                past.was_stopped = record == Record::Stopped;
                past.apply(record, tiers).ok_or_else(|| {
                    format!("its journal contradicts itself at byte {}", past.end)
                })?;
                past.end += bytes;
            }
            Err(end) => {
                // The last record may be torn, as its writer was killed. Behind it is nothing.
                let behind = rest.get(RECORD_BYTES_MAX..).unwrap_or_default();
                let torn = end == NotARecord::Damaged;
                if behind.iter().any(|byte| *byte != 0)
                    || (!torn && rest.iter().any(|byte| *byte != 0))
                {
                    return Err(format!("its journal is damaged at byte {}", past.end));
                }
                return Ok(past);
            }
        }
    }
}

/// Whether the last thing that happened is that the server was stopped in order.
pub(super) fn was_stopped(records: &[u8]) -> bool {
    let (mut at, mut was_stopped) = (0, false);
    while let Ok((record, bytes)) = Record::decode(&records[at..]) {
        was_stopped = record == Record::Stopped;
        at += bytes;
    }
    was_stopped
}

impl Past {
    /// `None` if that cannot have happened.
    fn apply(&mut self, record: Record<'_>, tiers: &Tiers) -> Option<()> {
        match record {
            Record::Session(record) if record.pages > PAGES_MAX => return None,
            Record::Session(record) => self.tell(record),
            Record::Block { region, block } => self.of(region)?.blocks.push(block),
            Record::End(region) => self.sessions.remove(&region).map(|session| {
                let mut table = session.table;
                table.clear(tiers, |_| ());
            })?,
            Record::Copy { to, from } => {
                let original = self.of(from)?;
                let (table, prefers) = (original.table.copy(to), original.prefers.clone());
                let working_set = original.working_set.copy();
                let copy = self.of(to)?;
                (copy.table, copy.prefers, copy.working_set) = (table, prefers, working_set);
            }
            Record::Put(page) => {
                let place = tiers.place(page.spot)?;
                let portion = Portion {
                    place,
                    dirty: page.dirty,
                    heat: 0,
                    absent: page.absent,
                    generation: page.generation,
                    version: page.version,
                    checksum: page.checksum,
                };
                let session = self.of(page.region)?;
                if page.page.get() >= session.about.record.pages {
                    return None;
                }
                let _ = session.table.put(tiers, page.page, &portion);
            }
            Record::Move { region, page, spot } => {
                let place = tiers.place(spot)?;
                self.of(region)?.table.with(page, |portion| portion.place = place)?;
            }
            Record::Clean { region, page } => {
                self.of(region)?.table.with(page, |portion| portion.dirty = 0)?;
            }
            Record::Own { region, page } => {
                let table = &mut self.of(region)?.table;
                table.leaf_of(page)?;
                table.make_own(tiers, page);
            }
            Record::Share { to, from, page } => {
                let leaf = self.of(from)?.table.leaf_of(page)?;
                self.of(to)?.table.share_leaf(tiers, page, leaf);
            }
            Record::Remove { region, range } => {
                self.of(region)?.table.remove(tiers, range, &mut Vec::new());
            }
            Record::Pin { region, range } => self.pins(region, range)?.insert(range),
            Record::Unpin { region, range } => self.pins(region, range)?.remove(range),
            Record::KeepBlocks { region, keep } => self.of(region)?.blocks.truncate(keep as usize),
            Record::Prefer { region, range, tier } => self.of(region)?.prefers.set(range, tier),
            Record::CopyOf { to, from } => self.of(to)?.parent = Some(from),
            Record::Shelf { shelf, class, slots, count } => {
                self.shelves.insert(shelf, Shelved { class, slots, count });
            }
            Record::Read { region, page, begins } => {
                // It may lie beyond a region that has become smaller since.
                self.of(region)?.working_set.touch_again(page, begins);
            }
            Record::Stopped | Record::Started => {}
        }
        Some(())
    }

    fn tell(&mut self, record: SessionRecord<'_>) {
        let id = record.session;
        self.next_session = self.next_session.max(id.get() + 1);
        let about = About::of(record);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.about = about;
            return;
        }
        let table = Table::new(id, record.page_bytes);
        let (blocks, pins) = (Vec::new(), PageSet::default());
        let (prefers, parent) = (Preferences::default(), None);
        let working_set = WorkingSet::default();
        let session = PastSession { about, blocks, pins, prefers, parent, table, working_set };
        self.sessions.insert(id, session);
    }

    fn of(&mut self, region: RegionId) -> Option<&mut PastSession> {
        self.sessions.get_mut(&region)
    }

    fn pins(&mut self, region: RegionId, range: PageRange) -> Option<&mut PageSet> {
        let session = self.of(region)?;
        let end = range.end()?;
        (end.get() <= session.about.record.pages).then_some(&mut session.pins)
    }
}

impl About {
    fn of(record: SessionRecord<'_>) -> Self {
        use super::record::SourceRecord;
        let name = record.name.to_owned();
        let (source, path) = match record.source {
            SourceRecord::Nothing => (SourceRecord::Nothing, String::new()),
            SourceRecord::Fill(byte) => (SourceRecord::Fill(byte), String::new()),
            SourceRecord::File { path, offset, identity } => {
                (SourceRecord::File { path: "", offset, identity }, path.to_owned())
            }
            SourceRecord::Server { path, offset, identity } => {
                (SourceRecord::Server { path: "", offset, identity }, path.to_owned())
            }
        };
        let own = record.own.map(|OwnRecord { path, offset, identity }| OwnAbout {
            path: path.to_owned(),
            offset,
            identity,
        });
        Self { record: SessionRecord { source, name: "", own: None, ..record }, name, path, own }
    }
}

#[cfg(test)]
mod tests {
    use farmem_region::{Checksum, PageIndex, Version};

    use super::super::record::{PageRecord, SourceRecord, Spot};
    use super::*;

    #[test]
    fn a_journal_of_what_cannot_be_is_refused_before_memory_is_taken_for_it() {
        let region = RegionId::new(1);
        let session = |pages| {
            let source = SourceRecord::Nothing;
            Record::Session(SessionRecord {
                session: region,
                token: 1,
                granted: 1,
                epoch: 1,
                pages,
                page_bytes: 4096,
                generation: 0,
                flags: 0,
                source,
                name: "",
                own: None,
            })
        };
        let page = PageIndex::new(1 << 50);
        let (version, checksum, spot) = (Version::new(1), Checksum::new(1), Spot::Dram(1));
        let put = PageRecord {
            region,
            page,
            version,
            checksum,
            spot,
            generation: 0,
            dirty: 0,
            absent: 0,
        };
        for records in [
            &[session(1 << 51), Record::Put(put)][..],
            &[session(100), Record::Put(put)],
            &[session(100), Record::Own { region, page }],
            &[Record::Own { region, page }],
        ] {
            let mut bytes = Vec::new();
            records.iter().for_each(|record| record.encode(&mut bytes));
            let mut tiers = Tiers::dram_only(8).unwrap();
            tiers.begin_replay();
            let refused = replay(&bytes, &tiers).unwrap_err();
            assert!(refused.contains("contradicts itself"), "{refused}");
        }
    }
}
