//! What is encoded is decoded; what is damaged is not.

use farmem_region::{
    Checksum, Epoch, Incarnation, PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId, SessionId,
    Version,
};
use farmem_wire::{
    Action, Attach, CountOf, DecodeError, HEADER_BYTES, Header, Hello, Malloc,
    PAGES_PER_MESSAGE_MAX, PARTS_PER_MESSAGE_MAX, PageEntry, Payload, RangeEntry, RefusalCode,
    ServerStat, Setup, StatCount, seal, verify_body,
};
use proptest::prelude::*;

prop_compose! {
    fn any_header()(
        action in 0u8..=255, reply: bool, request: u64, ids: [u64; 5], status: u16,
        entries in 0..=PAGES_PER_MESSAGE_MAX as u32, nanos: u32,
    ) -> Header {
        let mut header = Header {
            reply,
            leased: nanos & 1 != 0,
            news: nanos & 2 != 0,
            session: SessionId::new(ids[0]),
            region: RegionId::new(ids[1]),
            epoch: Epoch::new(ids[2]),
            incarnation: Incarnation::new(ids[3]),
            token: ids[4],
            entries,
            refusal: (status != 0).then(|| RefusalCode::from_number(status)),
            server_nanos: nanos,
            ..Header::request(Action::from_number(action), request)
        };
        match header.payload_kind() {
            Payload::Pages => header.payload = entries * PAGE_SIZE as u32,
            Payload::Parts => header.entries %= PARTS_PER_MESSAGE_MAX as u32 + 1,
            Payload::Body => {}
        }
        header
    }
}

proptest! {
    #[test]
    fn headers(header in any_header()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_flipped_bit_of_a_header_is_seen(header in any_header(), bit in 0..HEADER_BYTES * 8) {
        let mut bytes = header.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let seen = matches!(
            Header::decode(&bytes),
            Err(DecodeError::HeaderCrc { .. } | DecodeError::Magic(_))
        );
        prop_assert!(seen);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes: [u8; HEADER_BYTES], body: Vec<u8>) {
        let _ = Header::decode(&bytes);
        let _ = Hello::decode(&body);
        let _ = Setup::decode(&body);
        let _ = Attach::decode(&body);
        let _ = Malloc::decode(&body);
        let _ = farmem_wire::Create::decode(&body);
        let _ = farmem_wire::Delete::decode(&body);
        let _ = farmem_wire::Free::decode(&body);
        let _ = farmem_wire::Resize::decode(&body);
        let _ = farmem_wire::Prefer::decode(&body);
        let _ = farmem_wire::RegionInfo::decode_all(&body);
        let _ = farmem_wire::MapReply::decode(&body);
        let _ = ServerStat::decode(&body);
        let _ = StatCount::decode_all(&body).count();
        let _ = PageEntry::decode_all(&body).count();
        let _ = RangeEntry::decode_all(&body).count();
    }

    #[test]
    fn entries(fields: [u64; 3], slot: u32) {
        let entry = PageEntry {
            page: PageIndex::new(fields[0]),
            version: Version::new(fields[1]),
            checksum: Checksum::new(fields[2]),
            slot,
        };
        let start = PageIndex::new(fields[0]);
        let range = RangeEntry(PageRange { start, count: PageCount::new(fields[1]) });
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        prop_assert_eq!(PageEntry::decode_all(&bytes).collect::<Vec<_>>(), [entry]);
        bytes.clear();
        range.encode(&mut bytes);
        prop_assert_eq!(RangeEntry::decode_all(&bytes).collect::<Vec<_>>(), [range]);
    }

    #[test]
    fn setup(amount: u64, accept_partial: bool, dynamic: bool, name in ".{0,300}", secret: Vec<u8>) {
        let amount = farmem_region::ByteCount::new(amount);
        let setup =
            Setup { amount, accept_partial, dynamic, name: &name, credentials: &secret };
        let mut bytes = Vec::new();
        setup.encode(&mut bytes);
        let decoded = Setup::decode(&bytes).unwrap();
        prop_assert!(name.starts_with(decoded.name) && decoded.name.len() >= name.len().min(252));
        prop_assert_eq!(decoded.credentials, &secret[..secret.len().min(255)]);
        prop_assert_eq!(Setup { name: &name, credentials: &secret, ..decoded }, setup);
        for cut in 0..bytes.len() {
            prop_assert!(Setup::decode(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn a_damaged_body_is_seen(at in 0usize..32, bit in 0u8..8) {
        let mut message = vec![0; HEADER_BYTES];
        PageEntry::default().encode(&mut message);
        seal(Header { entries: 1, ..Header::request(Action::Read, 1) }, &mut message);
        let (head, body) = message.split_first_chunk_mut::<HEADER_BYTES>().unwrap();
        let header = Header::decode(head).unwrap();
        prop_assert!(verify_body(&header, body).is_ok());
        body[at] ^= 1 << bit;
        prop_assert!(verify_body(&header, body).is_err());
    }
}

#[test]
fn what_is_too_large_is_refused_by_its_header() {
    let check = |action, entries, payload| {
        let header = Header { entries, payload, ..Header::request(action, 1) };
        let decoded = Header::decode(&header.encode());
        matches!(decoded, Err(DecodeError::TooLarge { .. }))
    };
    let page = PAGE_SIZE as u32;
    assert!(!check(Action::Write, 256, 256 * page));
    assert!(check(Action::Write, 257, 257 * page));
    assert!(check(Action::Write, 1, page + 1));
    assert!(check(Action::Write, 1, 0));
    assert!(check(Action::Read, 257, 0));
    assert!(!check(Action::Setup, 0, 1024));
    assert!(check(Action::Setup, 0, 1025));
    assert!(check(Action::Unknown(200), u32::MAX, u32::MAX));
}

#[test]
fn a_name_that_is_too_long_is_refused() {
    // Found by the fuzzer.
    let mut body = vec![b'x'; 400];
    body[12..16].copy_from_slice(&[255, 0, 0, 0]);
    assert_eq!(Setup::decode(&body).unwrap().name.len(), 255);
    body[12..16].copy_from_slice(&[0, 1, 0, 0]);
    assert!(Setup::decode(&body).is_err());
    body[12..16].copy_from_slice(&[0, 0, 0, 1]);
    assert!(Setup::decode(&body).is_err());
}

#[test]
fn an_older_server_tells_fewer_fields() {
    let mut bytes = Vec::new();
    ServerStat { memory_bytes: 5, reserved_bytes: 6, ..ServerStat::default() }.encode(&mut bytes);
    bytes[0] = 1;
    let stat = ServerStat::decode(&bytes[..12]).unwrap();
    assert_eq!((stat.memory_bytes, stat.reserved_bytes), (5, 0));
    assert!(ServerStat::decode(&bytes[..11]).is_err());
}

#[test]
fn counts_follow_the_fields_of_a_stat() {
    let counts = [
        StatCount { of: CountOf::Granted(Action::Read), count: 7 },
        StatCount { of: CountOf::Refused(Action::Write), count: u64::MAX },
        StatCount { of: CountOf::Refusals(RefusalCode::Busy), count: 1 },
    ];
    let mut bytes = Vec::new();
    ServerStat { memory_bytes: 5, ..ServerStat::default() }.encode(&mut bytes);
    StatCount::encode_all(counts.into_iter(), &mut bytes);
    assert_eq!(ServerStat::decode(&bytes).unwrap().memory_bytes, 5);
    assert_eq!(StatCount::decode_all(&bytes).collect::<Vec<_>>(), counts);
    // A kind of a later version, and half a count.
    bytes.extend_from_slice(&[9, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(StatCount::decode_all(&bytes).collect::<Vec<_>>(), counts);
    StatCount::encode_all(std::iter::repeat_n(counts[0], 1000), &mut bytes);
    assert!(bytes.len() <= farmem_wire::BODY_BYTES_MAX + 3 * 12 + 14);
}
