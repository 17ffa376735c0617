//! TLS by its server name: ClientHellos in pieces, with several names, with none.

use std::io::Write as _;
use std::net::TcpStream;

use thyra_policy_compiler::residual::Context;
use thyra_policy_compiler::traffic::{PathNormalization, Traffic};

use super::super::client::client_hello;
use super::client::rest;
use super::door::{FULL, Guard, Node};
use super::pod::silent;
use super::policy::{Form, server_name};

const NAME: &str = "one.example";

fn with_length(bytes: &[u8]) -> Vec<u8> {
    let mut all = u16::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
    all.extend_from_slice(bytes);
    all
}

/// An extension: its number, and what it says.
fn extension(number: u16, says: &[u8]) -> Vec<u8> {
    let mut all = number.to_be_bytes().to_vec();
    all.extend(with_length(says));
    all
}

/// `server_name` (RFC 6066 3) with these host names.
fn names(names: &[&str]) -> Vec<u8> {
    let mut list = Vec::new();
    for name in names {
        list.push(0);
        list.extend(with_length(name.as_bytes()));
    }
    extension(0, &with_length(&list))
}

/// `application_layer_protocol_negotiation` (RFC 7301 3.1).
fn protocols(protocols: &[&str]) -> Vec<u8> {
    let mut list = Vec::new();
    for protocol in protocols {
        list.push(u8::try_from(protocol.len()).unwrap());
        list.extend_from_slice(protocol.as_bytes());
    }
    extension(16, &with_length(&list))
}

/// A ClientHello's handshake message (RFC 8446 4.1.2) with these extensions behind `supported_versions`.
fn hello(extensions: &[Vec<u8>]) -> Vec<u8> {
    let mut all = vec![0, 43, 0, 3, 2, 3, 4];
    all.extend(extensions.concat());
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 4, 0x13, 0x01, 0xc0, 0x2f, 1, 0]);
    body.extend(with_length(&all));
    let mut message = vec![1, 0];
    message.extend(with_length(&body));
    message
}

/// The message in records of at most `size` bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for part in message.chunks(size) {
        all.extend([0x16, 3, 1]);
        all.extend(with_length(part));
    }
    all
}

fn one_record(extensions: &[Vec<u8>]) -> Vec<u8> {
    records(&hello(extensions), 16_384)
}

/// Bytes, and whether they pass DENY and ALLOW of `NAME`; by the name that Envoy and the host read in them.
struct Case {
    what: &'static str,
    bytes: Vec<u8>,
    read: &'static str,
    deny: bool,
    allow: bool,
}

fn case(what: &'static str, bytes: Vec<u8>, read: &'static str, deny: bool, allow: bool) -> Case {
    Case {
        what,
        bytes,
        read,
        deny,
        allow,
    }
}

// long: a table, a case each
fn cases() -> Vec<Case> {
    let padding = extension(21, &[0; 9000]);
    vec![
        case("the name", one_record(&[names(&[NAME])]), NAME, false, true),
        case(
            "another one",
            one_record(&[names(&["two.example"])]),
            "two.example",
            true,
            false,
        ),
        case(
            "in capitals",
            one_record(&[names(&["ONE.Example"])]),
            "one.example",
            false,
            true,
        ),
        case("none", client_hello(None), "", true, false),
        case(
            "in records of one byte",
            records(&hello(&[names(&[NAME])]), 1),
            NAME,
            false,
            true,
        ),
        case(
            "in records of seven bytes",
            records(&hello(&[names(&[NAME])]), 7),
            NAME,
            false,
            true,
        ),
        case(
            "behind 9 KB",
            one_record(&[padding, names(&[NAME])]),
            NAME,
            false,
            true,
        ),
        case(
            "with HTTP to come",
            one_record(&[names(&[NAME]), protocols(&["h2", "http/1.1"])]),
            NAME,
            false,
            true,
        ),
        case(
            "with HTTP/1.1 to come",
            one_record(&[protocols(&["http/1.1"]), names(&[NAME])]),
            NAME,
            false,
            true,
        ),
        case(
            "with h2c to come",
            one_record(&[protocols(&["h2c"]), names(&[NAME])]),
            NAME,
            false,
            true,
        ),
        case(
            "behind a warning",
            [
                b"\x15\x03\x01\x00\x02\x01\x5a".to_vec(),
                one_record(&[names(&[NAME])]),
            ]
            .concat(),
            NAME,
            false,
            true,
        ),
        case(
            "behind an empty record",
            [b"\x16\x03\x01\x00\x00".to_vec(), one_record(&[names(&[NAME])])].concat(),
            NAME,
            false,
            true,
        ),
        case(
            "behind a change of ciphers",
            [
                b"\x14\x03\x01\x00\x01\x01".to_vec(),
                one_record(&[names(&[NAME])]),
            ]
            .concat(),
            "",
            true,
            false,
        ),
        case(
            "under a version of records that is none",
            [
                b"\x16\x03\x09".to_vec(),
                one_record(&[names(&[NAME])])[3..].to_vec(),
            ]
            .concat(),
            NAME,
            false,
            true,
        ),
        // No ClientHello to BoringSSL, so no name to Envoy, in a sidecar too: only an ALLOW holds these.
        case(
            "two names",
            one_record(&[names(&["two.example", NAME])]),
            "",
            true,
            false,
        ),
        case(
            "two names, the other way",
            one_record(&[names(&[NAME, "two.example"])]),
            "",
            true,
            false,
        ),
        case(
            "two lists of names",
            one_record(&[names(&["two.example"]), names(&[NAME])]),
            "",
            true,
            false,
        ),
        case(
            "no TLS",
            b"\x00\x01\x02 neither TLS nor HTTP\r\n".to_vec(),
            "",
            true,
            false,
        ),
    ]
}

fn host_says(form: Form, read: &str) -> bool {
    let traffic = Traffic {
        sni: (!read.is_empty()).then(|| read.to_owned()),
        ..Traffic::default()
    };
    let ending = server_name(form, NAME).end(&Context {
        traffic: &traffic,
        source: "127.0.0.1".parse().unwrap(),
        paths: PathNormalization::Base,
    });
    ending.action == thyra_datapath_abi::Action::Allow
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_name_in_disguise_gets_what_dry_run_says() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let cases = cases();
    let (mut doors, mut expected) = (Vec::new(), Vec::new());
    for case in &cases {
        for (form, passes) in [(Form::Deny, case.deny), (Form::Allow, case.allow)] {
            assert_eq!(host_says(form, case.read), passes, "{} ({form:?})", case.what);
            let door = node.door(&server_name(form, NAME), FULL, silent).await;
            let mut stream = node.connect(&door);
            stream.write_all(&case.bytes).unwrap();
            if passes {
                door.pod.wait(|got| got.len() >= case.bytes.len());
            } else {
                let heard = rest(&mut stream);
                assert!(heard.is_empty(), "{} ({form:?}): {heard:?}", case.what);
            }
            doors.push(door);
            expected.push((case, passes));
        }
    }
    for (record, (case, passes)) in node.finish_all(doors).await.into_iter().zip(expected) {
        let sent = if passes {
            vec![case.bytes.clone()]
        } else {
            Vec::new()
        };
        assert_eq!(record, sent, "{}", case.what);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_hello_cut_at_any_byte_is_judged_as_a_whole() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let bytes = one_record(&[names(&[NAME])]);
    let (mut doors, mut expected) = (Vec::new(), Vec::new());
    for (form, guard, passes) in [
        (Form::Deny, FULL, false),
        (Form::Allow, FULL, true),
        // The control: without a rule the denied one passes in the same pieces.
        (Form::Deny, Guard::NoParser, true),
    ] {
        let door = node.door(&server_name(form, NAME), guard, silent).await;
        let cuts = 1..bytes.len();
        let mut streams: Vec<TcpStream> = cuts.clone().map(|_| node.connect(&door)).collect();
        for (stream, cut) in streams.iter_mut().zip(cuts.clone()) {
            stream.write_all(&bytes[..cut]).unwrap();
        }
        // Whatever was sent before this, Envoy's one worker has read when it is through with this.
        let other = if form == Form::Allow { NAME } else { "two.example" };
        let hello = one_record(&[names(&[other])]);
        let mut through = node.connect(&door);
        through.write_all(&hello).unwrap();
        door.pod.wait(|got| got == hello);
        for (stream, cut) in streams.iter_mut().zip(cuts.clone()) {
            stream.write_all(&bytes[cut..]).unwrap();
            if !passes {
                assert!(rest(stream).is_empty(), "{cut}");
            }
        }
        if passes {
            door.pod.wait_all(cuts.len(), |got| got == bytes);
        }
        doors.push(door);
        let mut all = vec![hello];
        all.extend(cuts.filter(|_| passes).map(|_| bytes.clone()));
        all.sort();
        expected.push(all);
    }
    for (mut record, expected) in node.finish_all(doors).await.into_iter().zip(expected) {
        record.sort();
        assert_eq!(record, expected);
    }
}
