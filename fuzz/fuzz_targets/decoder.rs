//! Any bytes either decode to a message that encodes to the same bytes, or are refused.
//!
//! The checksums are made right first: guarded by them, hardly any input would reach what lies
//! behind. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run decoder`.

#![no_main]

use farmem_wire::{
    AskMap, Attach, BackupPlace, Copy, Create, Delete, FullBody, GrantedSetup, HEADER_BYTES, Header, Hello, HelloReply,
    List, Malloc, MallocReply, MapReply, Open, PageEntry, Payload, Prefer, Progress, RangeEntry, RegionInfo, Resize,
    STAT_COUNTS_MAX, ServerStat, Setup, StatCount, crc32c, verify_body,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else { return };
    let _ = Header::decode(head);
    let mut head = *head;
    head[..4].copy_from_slice(b"MSMP");
    let crc = crc32c(&head[..HEADER_BYTES - 4]);
    head[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    let Ok(header) = Header::decode(&head) else { return };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    assert!(header.message_bytes() <= farmem_wire::HEAD_BYTES_MAX + farmem_wire::PAYLOAD_BYTES_MAX);
    let Some(covered) = rest.get(..header.covered_bytes()) else { return };
    let _ = verify_body(&header, covered);
    let (entries, body) = covered.split_at(header.entry_bytes());
    let mut again = Vec::new();
    for entry in PageEntry::decode_all(entries) {
        again.clear();
        entry.encode(&mut again);
        assert_eq!(PageEntry::decode_all(&again).next(), Some(entry));
    }
    assert_eq!(RangeEntry::decode_all(entries).len(), header.entries as usize);
    if header.payload_kind() == Payload::Body {
        decode_body(body);
    }
});

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
        Hello, HelloReply, Setup, GrantedSetup, Attach, Malloc, MallocReply, FullBody, ServerStat,
        Create, Open, Copy, Delete, Resize, Prefer, BackupPlace, List, Progress, AskMap, MapReply
    );
    if let Ok(infos) = RegionInfo::decode_all(body) {
        again.clear();
        infos.iter().for_each(|info| info.encode(&mut again));
        assert_eq!(RegionInfo::decode_all(&again), Ok(infos));
    }
    let counts: Vec<_> = StatCount::decode_all(body).take(STAT_COUNTS_MAX).collect();
    again.clear();
    // Behind no fields.
    again.extend_from_slice(&0u32.to_le_bytes());
    StatCount::encode_all(counts.iter().copied(), &mut again);
    assert!(StatCount::decode_all(&again).eq(counts));
}
