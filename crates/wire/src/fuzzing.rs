//! What fuzzing asks of this crate: any bytes either decode to a message that encodes to the same
//! bytes, or are refused. Run by `fuzz/fuzz_targets/decoder.rs`, and on its seeds by every test
//! run.

use farmem_region::PAGE_SIZE;

use crate::{
    AskMap, Attach, BackupPlace, Copy, Create, Delete, Free, FullBody, GrantedSetup, HEADER_BYTES,
    Header, Hello, HelloReply, List, Malloc, MallocReply, MapChange, MapReply, Open, PageEntry,
    PartEntry, Payload, Prefer, Progress, RangeEntry, RegionInfo, Resize, STAT_COUNTS_MAX,
    ServerStat, Setup, Slots, StatCount, TakenBody, crc32c, verify_body,
};

/// Takes bytes for a message. The checksums are made right first: guarded by them, hardly any
/// input would reach what lies behind.
///
/// # Panics
/// If something is decoded to what it does not say.
pub fn decoder(input: &[u8]) {
    let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else { return };
    let _ = Header::decode(head);
    let mut head = *head;
    head[..4].copy_from_slice(&crate::MAGIC);
    let crc = crc32c(&head[..HEADER_BYTES - 4]);
    head[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    let Ok(header) = Header::decode(&head) else { return };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    assert!(header.message_bytes() <= crate::HEAD_BYTES_MAX + crate::PAYLOAD_BYTES_MAX);
    let Some(covered) = rest.get(..header.covered_bytes()) else { return };
    let _ = verify_body(&header, covered);
    let (entries, body) = covered.split_at(header.entry_bytes());
    let mut again = Vec::new();
    for entry in PageEntry::decode_all(entries) {
        again.clear();
        entry.encode(&mut again);
        assert_eq!(PageEntry::decode_all(&again).next(), Some(entry));
    }
    for part in PartEntry::decode_all(entries) {
        again.clear();
        part.encode(&mut again);
        assert_eq!(PartEntry::decode_all(&again).next(), Some(part));
        assert!(!part.is_of(512) || part.range().end <= PAGE_SIZE);
    }
    for range in RangeEntry::decode_all(entries) {
        again.clear();
        range.encode(&mut again);
        assert_eq!(RangeEntry::decode_all(&again).next(), Some(range));
    }
    for change in MapChange::decode_all(entries) {
        again.clear();
        change.encode(&mut again);
        let told = MapChange::decode_all(&again).next();
        assert_eq!(told.map(|told| told.range), Some(change.range));
        assert_eq!(told.and_then(|told| told.version), change.version);
    }
    if header.payload_kind() == Payload::Body {
        decode_body(body);
    }
}

/// Every kind of body, whichever the action: none may read past its end.
fn decode_body(body: &[u8]) {
    let mut again = Vec::new();
    macro_rules! round_trip {
        ($($kind:ident),*) => {$(
            again.clear();
            if let Ok(decoded) = $kind::decode(body) {
                decoded.encode(&mut again);
                assert_eq!($kind::decode(&again), Ok(decoded));
            }
        )*};
    }
    round_trip!(
        Hello,
        HelloReply,
        Setup,
        GrantedSetup,
        Attach,
        Malloc,
        MallocReply,
        FullBody,
        ServerStat,
        Create,
        Delete,
        Free,
        Resize,
        Prefer,
        Open,
        Copy,
        List,
        Progress,
        AskMap,
        MapReply,
        BackupPlace,
        TakenBody,
        Slots
    );
    if let Ok(infos) = RegionInfo::decode_all(body) {
        again.clear();
        infos.iter().for_each(|info| info.encode(&mut again));
        assert_eq!(RegionInfo::decode_all(&again), Ok(infos));
    }
    let slots: Vec<_> = Slots::decode_assigned(body).collect();
    again.clear();
    slots.iter().for_each(|slot| Slots::encode_assigned(*slot, &mut again));
    assert!(Slots::decode_assigned(&again).eq(slots));
    let counts: Vec<_> = StatCount::decode_all(body).take(STAT_COUNTS_MAX).collect();
    again.clear();
    // Behind no fields.
    again.extend_from_slice(&0u32.to_le_bytes());
    StatCount::encode_all(counts.iter().copied(), &mut again);
    assert!(StatCount::decode_all(&again).eq(counts));
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_seeds_of_the_decoder_are_decoded_or_refused() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/decoder");
        let mut count = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            super::decoder(&std::fs::read(seed.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 20, "{count} seeds");
    }
}
