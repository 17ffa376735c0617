//! Every case of `testdata/packets` in the kernel, against the same case on the host. Needs root.
//!
//! Test-run gives every packet a socket, so that "no interface and no socket" is tested on the host alone;
//! the lab shows it with real packets.

#[path = "../engine/tests/packets/any.rs"]
mod any;
#[path = "../engine/tests/packets/case.rs"]
mod case;
#[path = "../engine/tests/packets/frame.rs"]
mod frame;
#[path = "testrun/kernel.rs"]
mod kernel;
#[path = "testrun/memory.rs"]
mod memory;
#[path = "testrun/policy.rs"]
mod policy;
#[path = "testrun/switch.rs"]
mod switch;
#[path = "../engine/tests/packets/world.rs"]
mod world;

use case::{Case, Change};
use kernel::Kernel;
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_abi::{Control, Event};
use thyra_datapath_engine::BankImage;
use thyra_datapath_engine::host::{End, Ledger};

/// `TCX_NEXT`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
const NEXT: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// Runs `test` in a thread with a network namespace of its own; says so loudly when there is no root to do
/// it.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("SKIPPED: BPF test-run needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        kernel::enter_namespace();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Cases that test-run can build: with interface 0 every packet counts as the node's.
fn cases() -> impl Iterator<Item = Case> {
    case::all()
        .into_iter()
        .map(|(_, case)| case)
        .filter(|case| (case.ingress() != 0 || case.socket) && !case.taken)
}

fn code(end: End) -> i32 {
    match end {
        End::Pass | End::PassOwn | End::Revoke => NEXT,
        End::Drop => SHOT,
        End::Refuse | End::Redirect(_) | End::RevokeInto(_) | End::Divert | End::GivenBack(_) => REDIRECT,
    }
}

fn check(kernel: &mut Kernel, case: &Case, bank: u32) {
    let change = compare(kernel, case, &frame::frame(&case.packet), bank);
    case.check(&change);
}

/// Runs a packet in the place of the case's own, here and there.
fn compare(kernel: &mut Kernel, case: &Case, bytes: &[u8], bank: u32) -> Change {
    let host = case.run(bytes);
    let node = case.node();
    kernel.attach(&node);
    kernel.control(Control::new(1, bank, node.control.0));
    kernel.remember(&case.before);
    kernel.set_budget(case.outbound_budget);
    let mark = if case.own { OWN_MARK } else { 0 };
    let run = kernel.run(case, bytes, mark);
    let ledger = kernel.take_ledger();
    let mut flows = kernel.flows();
    flows.sort();
    assert_eq!(
        (code(host.end), &host.flows),
        (run.code, &flows),
        "{}: code, connections: {bytes:02x?}",
        case.name
    );
    let events = ledger
        .events
        .iter()
        .map(|event| Event { time_ns: 0, ..*event })
        .collect();
    let ledger = Ledger { events, ..ledger };
    assert_eq!(host.ledger, ledger, "{}: ledger: {bytes:02x?}", case.name);
    host
}

#[test]
fn with_local_redirect_the_kernel_does_to_others_packets_what_it_does_without() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        kernel.fill(&world::image(), 0, Control::new(1, 0, 0));
        for case in cases().filter_map(Case::apart) {
            if kernel::takes(&frame::frame(&case.packet)) {
                check(&mut kernel, &case, 0);
            }
        }
    });
}

#[test]
fn the_kernel_does_to_any_packet_what_the_host_does() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        kernel.fill(&world::image(), 0, Control::new(1, 0, 0));
        let cases: Vec<Case> = cases().collect();
        let frames: Vec<Vec<u8>> = cases.iter().map(|case| frame::frame(&case.packet)).collect();
        let mut random = any::Random(2);
        for _ in 0..any::wanted(3_000) {
            let (at, other) = (random.below(cases.len()), random.below(cases.len()));
            let bytes = random.changed(&frames[at], &frames[other]);
            if kernel::takes(&bytes) {
                compare(&mut kernel, &cases[at], &bytes, 0);
            }
        }
    });
}

/// The flags with NS, which is the lowest bit of the byte before.
fn with_flags(packet: &str, flags: u16) -> Vec<u8> {
    const FLAGS: usize = 14 + 20 + 13;
    let mut bytes = frame::frame(packet);
    let [low, high] = flags.to_le_bytes();
    bytes[FLAGS] = low;
    bytes[FLAGS - 1] |= high;
    bytes
}

#[test]
fn every_combination_of_flags_ends_alike_and_lets_no_foe_in() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        kernel.fill(&world::image(), 0, Control::new(1, 0, 0));
        let all: Vec<Case> = cases().collect();
        let named = |name: &str| all.iter().find(|case| case.name == name).expect("a case").clone();
        let own = vec!["outbound 10.244.0.2:8080 10.244.1.66:40000 answered".to_owned()];
        let foe = named("a_foe_is_refused");
        let with_own = Case {
            before: own.clone(),
            ..foe.clone()
        };
        let answer = named("an_answer_to_a_foe_is_revoked");
        let answer_with_own = Case {
            before: own,
            ..answer.clone()
        };
        let step = (512 / any::wanted(512)).max(1);
        for flags in (0..512_u16).step_by(step) {
            let is_syn = flags & 0x12 == 0x02;
            let mut end = |case: &Case| compare(&mut kernel, case, &with_flags(&case.packet, flags), 0).end;
            assert_eq!(end(&named("a_friend_gets_in")), End::Pass, "{flags:#x}");
            assert_ne!(end(&foe), End::Pass, "{flags:#x}");
            // A SYN begins something of its own, whatever tuple it has.
            assert_eq!(end(&with_own) == End::Pass, !is_syn, "{flags:#x}");
            assert_eq!(end(&answer) == End::Pass, is_syn, "{flags:#x}");
            assert_eq!(end(&answer_with_own), End::Pass, "{flags:#x}");
        }
    });
}

#[test]
fn the_kernel_does_to_every_packet_what_the_host_does() {
    in_a_namespace(|| {
        for bank in [0, 1] {
            let mut kernel = Kernel::load();
            kernel.fill(&world::image(), bank, Control::new(1, bank, 0));
            for case in cases() {
                check(&mut kernel, &case, bank);
            }
        }
    });
}

#[test]
fn the_kernel_lets_in_what_the_tables_of_every_policy_case_let_in() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        let (mut asked, mut passed) = (0, 0);
        for mesh in policy::meshes() {
            let (more, through) = mesh.check(&mut kernel);
            asked += more;
            passed += through;
        }
        assert!(asked > 5_000, "{asked} packets");
        assert!(
            passed > asked / 10 && passed < asked * 9 / 10,
            "{passed} of {asked} passed"
        );
    });
}

#[test]
fn the_dead_bank_lets_nothing_in() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        // The control of the test above: the same packet, the same words, but the other bank is live.
        kernel.fill(&world::image(), 0, Control::new(1, 0, 0));
        kernel.fill(&BankImage::default(), 1, Control::new(2, 1, 0));
        for case in cases().filter(|case| case.verdict == world::ALLOW) {
            let node = case.node();
            kernel.attach(&node);
            kernel.control(Control::new(2, 1, node.control.0));
            let run = kernel.run(&case, &frame::frame(&case.packet), 0);
            // A pod's own SYN goes on, to the `to_pod` that drops it.
            let goes_on = case.to.is_some() && run.code == NEXT;
            assert!(SHOT == run.code || goes_on, "{}: {}", case.name, run.code);
        }
    });
}

#[test]
fn a_refused_syn_becomes_a_reset_with_right_numbers_and_sums() {
    in_a_namespace(|| {
        let mut kernel = Kernel::load();
        kernel.fill(&world::image(), 0, Control::new(1, 0, 0));
        for case in cases().filter(|case| case.end == "refuse" && case.outbound_budget.is_none()) {
            let node = case.node();
            kernel.attach(&node);
            kernel.control(Control::new(1, 0, node.control.0));
            kernel.remember(&case.before);
            let frame = frame::frame(&case.packet);
            let run = kernel.run(&case, &frame, 0);
            check_reset(&case.name, &frame, &run.bytes);
        }
    });
}

/// An RST|ACK back to where `frame` came from, 20 bytes of TCP, every sum right.
fn check_reset(name: &str, frame: &[u8], reset: &[u8]) {
    let is_tagged = matches!(frame[12..14], [0x81, 0x00] | [0x88, 0xa8]);
    let l3 = if is_tagged { 18 } else { 14 };
    let (l4, source, destination) = match frame[l3] >> 4 {
        4 => (l3 + 20, 12..16, 16..20),
        _ => (l3 + 40, 8..24, 24..40),
    };
    let (ip, reply) = (&frame[l3..l4], &reset[l3..l4]);
    assert_eq!(l4 + 20, reset.len(), "{name}: length");
    assert_eq!(
        (&frame[0..6], &frame[6..12]),
        (&reset[6..12], &reset[0..6]),
        "{name}: the MACs are swapped"
    );
    assert_eq!(
        (&ip[source.clone()], &ip[destination.clone()]),
        (&reply[destination], &reply[source]),
        "{name}"
    );
    assert_eq!(
        frame[l4..l4 + 2],
        reset[l4 + 2..l4 + 4],
        "{name}: destination port"
    );
    assert_eq!(frame[l4 + 2..l4 + 4], reset[l4..l4 + 2], "{name}: source port");
    assert_eq!(0_u32.to_be_bytes(), reset[l4 + 4..l4 + 8], "{name}: SEQ");
    // The SYN, and the data that it carries.
    let sent = 1001 + u32::try_from(frame.len() - l4 - 20).unwrap();
    assert_eq!(
        sent.to_be_bytes(),
        reset[l4 + 8..l4 + 12],
        "{name}: ACK = SEG.SEQ + SEG.LEN"
    );
    assert_eq!(
        (0x50, 0x14),
        (reset[l4 + 12], reset[l4 + 13]),
        "{name}: RST|ACK without options"
    );
    let (addresses, header) = if l4 - l3 == 20 {
        (&reply[12..20], Some(reply))
    } else {
        (&reply[8..40], None)
    };
    let pseudo = [addresses, &[0, 6, 0, 20]].concat();
    assert_eq!(
        0xffff,
        sum(&[&pseudo[..], &reset[l4..]].concat()),
        "{name}: TCP checksum"
    );
    assert!(
        header.is_none_or(|header| sum(header) == 0xffff),
        "{name}: IP checksum"
    );
}

/// The ones' complement sum, worked out apart from the engine.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) * 256 + u64::from(pair[1]))
        .sum();
    while sum > 0xffff {
        sum = sum % 65_536 + sum / 65_536;
    }
    u16::try_from(sum).unwrap()
}
