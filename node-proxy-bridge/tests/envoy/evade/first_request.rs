//! Connections whose first request decides for all of them, and whose bytes the pod gets as they are: what the oracle
//! lets pass, and what it doesn't.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thyra_node_proxy_bridge::bridge::Question;
use thyra_node_proxy_bridge::hold::oracle::{Oracle, Said, ask};
use thyra_node_proxy_bridge::listener::{HttpOptions, Reading};
use thyra_policy_compiler::traffic::PathNormalization;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::timeout;

use super::super::node::{LIMIT, Node, binary, wanted};
use super::frames::{END_HEADERS, HEADERS, block, frame, opening, request};
use super::policy::{Form, declared};

const RESET: u8 = 3;

/// An Envoy whose oracle judges by `Form::Deny`.
async fn oracle(paths: PathNormalization) -> Option<(Node, PathBuf)> {
    let mut node = Node::start(&binary().await?, paths, false).await;
    node.bridge.set_http(HttpOptions {
        paths,
        as_it_is: true,
        ..HttpOptions::default()
    });
    let residual = Arc::new(declared(Form::Deny));
    node.bridge.apply(&[wanted("cell", Reading::Http, &residual)]);
    let question: Question = (Reading::Http, residual.address());
    let socket = node.oracle(&question).await;
    Some((node, socket))
}

/// Asks with these pieces, one after the other, and nothing more; `None` where Envoy waits for more.
async fn said(socket: &Path, pieces: &[&[u8]]) -> Option<Said> {
    let oracle = Oracle {
        socket: socket.to_owned(),
        reading: Reading::Http,
    };
    let end = |text: &str| text.parse::<SocketAddr>().unwrap();
    let ends = (end("10.0.0.9:40000"), end("10.0.0.1:80"));
    let (send, receive) = unbounded_channel();
    for piece in pieces {
        send.send(piece.to_vec()).unwrap();
    }
    let answer = timeout(LIMIT, ask(&oracle, ends, receive)).await.ok();
    drop(send);
    answer
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n\r\n")
}

const FIELDS: [(&str, &str); 3] = [
    (":scheme", "http"),
    (":authority", "shop.example"),
    ("x-role", "user"),
];

fn fields<'a>(method: &'a str, path: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut all = vec![(":method", method), (":path", path)];
    all.extend(FIELDS);
    all
}

/// A request of gRPC, whose body is still to come.
fn grpc(stream: u32, path: &str) -> Vec<u8> {
    let mut all = fields("POST", path);
    all.extend([("content-type", "application/grpc"), ("te", "trailers")]);
    frame(HEADERS, END_HEADERS, stream, &block(&all))
}

#[tokio::test]
async fn of_http1_the_head_of_the_first_request_decides() {
    let Some((_node, socket)) = oracle(PathNormalization::Base).await else {
        return;
    };
    let post = |path: &str, more: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n{more}\r\n")
    };
    let allowed = [
        get("/public"),
        // Pipelined: what follows is not judged.
        get("/public") + &get("/admin"),
        post("/public", ""),
        post("/public", "") + &"x".repeat(16_000),
        post("/public", "Expect: 100-continue\r\n"),
        post("/public", "Content-Type: application/grpc\r\n"),
        get("/public").replace(
            "\r\n\r\n",
            "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ),
    ];
    for request in &allowed {
        assert_eq!(
            said(&socket, &[request.as_bytes()]).await,
            Some(Said::Yes),
            "{request:.90}"
        );
    }
    let refused = [
        get("/admin"),
        get("/admin") + &get("/public"),
        get("/admin?x"),
        post("/admin", "Expect: 100-continue\r\n"),
        post("/admin", "Content-Type: application/grpc\r\n"),
        get("/public").replace("GET", "DELETE"),
        get("/public").replace("shop.example", "admin.example"),
        get("/public").replace("\r\n\r\n", "\r\nx-role: admin\r\n\r\n"),
        get("http://shop.example/public"),
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n".to_owned(),
        "SSH-2.0-OpenSSH\r\n\r\n".to_owned(),
        "\u{16}\u{3}\u{1}\u{0}\u{0}\r\n\r\n".to_owned(),
        get("/public").replace("1.1", "1.0"),
        get("/public").replace("\r\nHost", "\nHost"),
        get("/public").replace("Host:", "Host :"),
    ];
    for request in &refused {
        assert_eq!(
            said(&socket, &[request.as_bytes()]).await,
            Some(Said::No),
            "{request:?}"
        );
    }
    for (path, answer) in [("/public", Said::Yes), ("/admin", Said::No)] {
        let whole = get(path);
        for cut in (1..whole.len()).step_by(5) {
            let (one, other) = whole.as_bytes().split_at(cut);
            assert_eq!(
                said(&socket, &[one, other]).await,
                Some(answer),
                "{path} at {cut}"
            );
        }
    }
}

#[tokio::test]
async fn of_http2_the_first_stream_decides() {
    let Some((_node, socket)) = oracle(PathNormalization::Base).await else {
        return;
    };
    let plain = |stream, path| request(stream, &fields("GET", path));
    let reset = frame(RESET, 0, 1, &8_u32.to_be_bytes());
    let cases: [(&str, Vec<Vec<u8>>, Said); 9] = [
        ("allowed", vec![plain(1, "/public")], Said::Yes),
        ("refused", vec![plain(1, "/admin")], Said::No),
        ("grpc, allowed", vec![grpc(1, "/shop.Cart/Get")], Said::Yes),
        ("grpc, refused", vec![grpc(1, "/admin")], Said::No),
        (
            "the second is not judged",
            vec![plain(1, "/public"), plain(3, "/admin")],
            Said::Yes,
        ),
        (
            "the second decides nothing",
            vec![plain(1, "/admin"), plain(3, "/public")],
            Said::No,
        ),
        (
            "one that is taken back was the first",
            vec![plain(1, "/admin"), reset, plain(3, "/public")],
            Said::No,
        ),
        ("a path in disguise", vec![plain(1, "/public/../admin")], Said::No),
        (
            "a method",
            vec![request(1, &fields("DELETE", "/public"))],
            Said::No,
        ),
    ];
    for (what, frames, answer) in cases {
        let bytes = [opening(), frames.concat()].concat();
        assert_eq!(said(&socket, &[&bytes]).await, Some(answer), "{what}");
        let pieces: Vec<&[u8]> = bytes.chunks(7).collect();
        assert_eq!(said(&socket, &pieces).await, Some(answer), "{what}, in pieces");
    }
}

/// Whom normalisation would change: the pod would get another path than was judged.
const DISGUISED: [&str; 12] = [
    "/public/../admin",
    "/public/./x",
    "/public/..",
    "/public/.",
    "/public/..;x/admin",
    "/public/.;x/y",
    "/public/%2e%2e/admin",
    "/%61dmin",
    "/public\\..\\admin",
    "/public/%7Euser",
    "/public/\"x\"",
    "/public/%00",
];

#[tokio::test]
async fn a_path_that_would_be_normalised_is_refused() {
    let Some((_node, socket)) = oracle(PathNormalization::Base).await else {
        return;
    };
    for path in DISGUISED {
        assert_eq!(
            said(&socket, &[get(path).as_bytes()]).await,
            Some(Said::No),
            "{path}"
        );
    }
    let plain = [
        "/",
        "/a//b/",
        "/a/.b/..c/...",
        "/a/b;c=d/e,f/%20/%C3%BC",
        "/a%2Fb",
        "/a?x=/../admin&y=%61",
        "/a.b/x..",
    ];
    for path in plain {
        assert_eq!(
            said(&socket, &[get(path).as_bytes()]).await,
            Some(Said::Yes),
            "{path}"
        );
    }
}

#[tokio::test]
async fn slashes_are_refused_where_the_mesh_merges_or_decodes_them() {
    let cases = [
        (
            PathNormalization::MergeSlashes,
            [("/a//b", Said::No), ("/a%2Fb", Said::Yes), ("/a/b/", Said::Yes)],
        ),
        (
            PathNormalization::DecodeAndMergeSlashes,
            [("/a//b", Said::No), ("/a%2Fb", Said::No), ("/a%5cb", Said::No)],
        ),
        // The control: a mesh that normalises nothing has no such guard, and the path passes as it is.
        (
            PathNormalization::None,
            [
                ("/public/../admin", Said::Yes),
                ("/%61dmin", Said::Yes),
                ("/admin", Said::No),
            ],
        ),
    ];
    for (paths, cases) in cases {
        let Some((_node, socket)) = oracle(paths).await else {
            return;
        };
        for (path, answer) in cases {
            assert_eq!(
                said(&socket, &[get(path).as_bytes()]).await,
                Some(answer),
                "{paths:?} {path}"
            );
        }
    }
}
