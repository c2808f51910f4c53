#include "shared/handoff.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

namespace elastikv {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t max_clients = 64;
constexpr std::chrono::seconds client_time{5};
constexpr std::chrono::milliseconds accept_pause{100};
constexpr timeval answer_time{10, 0};
// A client asks for a part at a time: the system limits how many descriptors are under way at once.
constexpr std::size_t part_size = 64;

// One message each, as both ends are SOCK_SEQPACKET.
struct Request {
    HandoffAddress::Key key{};
    std::uint32_t first = 0;
};
struct Answer {
    std::uint32_t total = 0;  // 0: no such key
    std::uint32_t first = 0;
};

struct alignas(cmsghdr) ControlBuffer {
    char bytes[CMSG_SPACE(part_size * sizeof(int))] = {};
};

[[noreturn]] void fail(const std::string& what, int error) { throw HandoffFailed(what + ": " + std::strerror(error)); }

HandoffAddress::Key random_key() {
    HandoffAddress::Key key;
    if (getrandom(key.data(), key.size(), 0) != static_cast<ssize_t>(key.size())) fail("no random key", errno);
    return key;
}

socklen_t fill_name(sockaddr_un& name, const std::string& text) {
    name.sun_family = AF_UNIX;
    if (text.empty() || text.size() > sizeof name.sun_path - 1) {
        throw HandoffFailed("'" + text + "' is no socket that elastikv made");
    }
    std::memcpy(name.sun_path + 1, text.data(), text.size());  // behind a 0: the abstract namespace
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
}

// The user at the other end.
std::optional<uid_t> peer_of(int socket) {
    ucred credentials{};
    socklen_t size = sizeof credentials;
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return std::nullopt;
    return credentials.uid;
}

bool send_part(int socket, Answer answer, const std::vector<UniqueFd>& all) {
    iovec text{&answer, sizeof answer};
    msghdr message{};
    message.msg_iov = &text;
    message.msg_iovlen = 1;
    ControlBuffer control;
    const std::size_t count = std::min(part_size, all.size() - answer.first);
    if (count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        cmsghdr* const header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        for (std::size_t i = 0; i < count; ++i) {
            const int fd = all[answer.first + i].get();
            std::memcpy(CMSG_DATA(header) + i * sizeof(int), &fd, sizeof fd);
        }
    }
    return sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof answer);
}

// The listening socket, for a forked child to close: as long as any process holds it, clients would wait for an answer
// after the exporter's end.
std::atomic<int> open_listener{-1};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    const int inherited = open_listener.exchange(-1);
    if (inherited >= 0) close(inherited);
});

}  // namespace

struct FdBroker::Server {
    struct Client {
        UniqueFd socket;
        Clock::time_point deadline;
    };

    explicit Server(const FdBroker& broker_) : broker(broker_) {
        std::string text = "elastikv-" + std::to_string(getpid()) + "-";
        for (const std::uint8_t byte : random_key()) {
            text += "0123456789abcdef"[byte >> 4];
            text += "0123456789abcdef"[byte & 15];
        }
        listener = UniqueFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        stop = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!listener || !stop) fail("no socket to share memory by", errno);
        sockaddr_un address{};
        const socklen_t size = fill_name(address, text);
        if (bind(listener.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
            listen(listener.get(), static_cast<int>(max_clients)) != 0) {
            fail("no socket to share memory by", errno);
        }
        name = std::move(text);
    }

    void run() {
        std::vector<pollfd> events;
        for (;;) {
            const auto now = Clock::now();
            std::erase_if(clients, [&](const Client& client) { return client.deadline <= now; });
            const bool listens = clients.size() < max_clients && accept_again <= now;
            events.assign({{stop.get(), POLLIN, 0}, {listens ? listener.get() : -1, POLLIN, 0}});
            for (const Client& client : clients) events.push_back({client.socket.get(), POLLIN, 0});
            if (poll(events.data(), events.size(), time_to_wait(now)) < 0) {
                if (errno == EINTR) continue;
                return;
            }
            if (events[0].revents != 0) return;
            for (std::size_t i = 0; i < clients.size(); ++i) {
                if (events[i + 2].revents != 0 && !answer(clients[i])) clients[i].deadline = now;
            }
            if (events[1].revents != 0) accept_client();
        }
    }

    int time_to_wait(Clock::time_point now) const {
        std::optional<Clock::time_point> next;
        if (accept_again > now) next = accept_again;
        for (const Client& client : clients) next = next ? std::min(*next, client.deadline) : client.deadline;
        if (!next) return -1;
        return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(*next - now).count());
    }

    void accept_client() {
        UniqueFd socket(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (!socket) {
            // Out of descriptors, maybe: poll would come back at once.
            if (errno != EAGAIN) accept_again = Clock::now() + accept_pause;
            return;
        }
        if (peer_of(socket.get()) != geteuid()) return;
        clients.push_back({std::move(socket), Clock::now() + client_time});
    }

    // Whether the client may ask again.
    bool answer(const Client& client) const {
        Request request;
        const ssize_t got = recv(client.socket.get(), &request, sizeof request, MSG_DONTWAIT | MSG_TRUNC);
        if (got != static_cast<ssize_t>(sizeof request)) return false;
        const Set set = broker.find(request.key);
        if (!set || request.first >= set->size()) {
            (void)send_part(client.socket.get(), {}, {});
            return false;
        }
        return send_part(client.socket.get(), {static_cast<std::uint32_t>(set->size()), request.first}, *set);
    }

    const FdBroker& broker;
    UniqueFd listener;
    UniqueFd stop;
    std::string name;
    std::vector<Client> clients;
    Clock::time_point accept_again{};
    std::thread thread;
};

FdBroker& FdBroker::of_this_process() {
    // One a process, as for host_driver(): a child neither waits for its parent's lock nor has its parent's thread.
    static std::atomic<FdBroker*> current{nullptr};
    FdBroker* known = current.load(std::memory_order_acquire);
    while (known == nullptr || known->process_.forked()) {
        auto* const mine = new FdBroker;
        if (current.compare_exchange_strong(known, mine, std::memory_order_acq_rel)) {
            static const int at_exit = std::atexit([] {
                FdBroker* const broker = current.load(std::memory_order_acquire);
                if (!broker->process_.forked()) broker->stop();
            });
            (void)at_exit;
            return *mine;
        }
        delete mine;  // another thread was first
    }
    return *known;
}

void FdBroker::start() {
    if (stopped_) throw HandoffFailed("memory can't be shared any more: the process is exiting");
    if (server_) return;
    auto server = std::make_unique<Server>(*this);
    try {
        server->thread = std::thread([server = server.get()] { server->run(); });
    } catch (const std::system_error& error) {
        throw HandoffFailed(std::string("no thread to share memory by: ") + error.what());
    }
    open_listener = server->listener.get();
    server_ = std::move(server);
}

void FdBroker::stop() noexcept {
    std::unique_ptr<Server> server;
    {
        const std::lock_guard lock(mutex_);
        stopped_ = true;
        server = std::move(server_);
    }
    if (!server) return;
    open_listener = -1;
    (void)eventfd_write(server->stop.get(), 1);
    server->thread.join();
}

FdBroker::Registration FdBroker::add(std::vector<UniqueFd> descriptors) {
    if (descriptors.empty() || descriptors.size() > max_descriptors) {
        throw InvalidArgument("between 1 and " + std::to_string(max_descriptors) +
                              " descriptors can be shared at once, not " + std::to_string(descriptors.size()));
    }
    HandoffAddress address;
    address.key = random_key();
    auto set = std::make_shared<const std::vector<UniqueFd>>(std::move(descriptors));
    const std::lock_guard lock(mutex_);
    start();
    address.socket = server_->name;
    sets_.emplace(address.key, std::move(set));
    return {this, std::move(address)};
}

void FdBroker::withdraw(const HandoffAddress::Key& key) noexcept {
    if (process_.forked()) return;
    Set gone;  // closed without the lock
    const std::lock_guard lock(mutex_);
    const auto it = sets_.find(key);
    if (it == sets_.end()) return;
    gone = std::move(it->second);
    sets_.erase(it);
}

FdBroker::Set FdBroker::find(const HandoffAddress::Key& key) const {
    const std::lock_guard lock(mutex_);
    const auto it = sets_.find(key);
    return it == sets_.end() ? nullptr : it->second;
}

FdBroker::Registration::Registration(Registration&& other) noexcept
    : broker_(std::exchange(other.broker_, nullptr)), address_(std::move(other.address_)) {}

FdBroker::Registration& FdBroker::Registration::operator=(Registration&& other) noexcept {
    std::swap(broker_, other.broker_);
    std::swap(address_, other.address_);
    return *this;
}

FdBroker::Registration::~Registration() {
    if (broker_ != nullptr) broker_->withdraw(address_.key);
}

namespace {

[[noreturn]] void fail_as_gone(const std::string& socket_name) {
    throw HandoffFailed("the process that shared this memory is gone (nobody listens at '" + socket_name +
                        "'); it must live until the memory has been opened here");
}

UniqueFd connect_to(const std::string& socket_name) {
    UniqueFd end(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (!end) fail("no socket to fetch shared memory by", errno);
    setsockopt(end.get(), SOL_SOCKET, SO_RCVTIMEO, &answer_time, sizeof answer_time);
    setsockopt(end.get(), SOL_SOCKET, SO_SNDTIMEO, &answer_time, sizeof answer_time);
    sockaddr_un address{};
    const socklen_t size = fill_name(address, socket_name);
    if (connect(end.get(), reinterpret_cast<sockaddr*>(&address), size) != 0) {
        if (errno == ECONNREFUSED) fail_as_gone(socket_name);
        fail("the process that shared this memory can't be reached at '" + socket_name + "'", errno);
    }
    if (peer_of(end.get()) != geteuid()) {
        throw HandoffFailed("the process at '" + socket_name +
                            "' belongs to another user; memory is shared within one");
    }
    return end;
}

// Takes over what came with the message; closed again where the caller throws.
void collect(const msghdr& message, std::vector<UniqueFd>& out) {
    for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
         part = CMSG_NXTHDR(const_cast<msghdr*>(&message), part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t i = 0; i < count; ++i) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof fd);
            out.emplace_back(fd);
        }
    }
}

}  // namespace

std::vector<UniqueFd> fetch(const HandoffAddress& address) {
    const UniqueFd end = connect_to(address.socket);
    std::vector<UniqueFd> all;
    for (;;) {
        const Request request{address.key, static_cast<std::uint32_t>(all.size())};
        if (send(end.get(), &request, sizeof request, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof request)) {
            if (errno == ECONNRESET || errno == EPIPE) fail_as_gone(address.socket);
            fail("the process that shared this memory has closed the connection", errno);
        }
        Answer answer;
        iovec text{&answer, sizeof answer};
        ControlBuffer control;
        msghdr message{};
        message.msg_iov = &text;
        message.msg_iovlen = 1;
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        const ssize_t got = recvmsg(end.get(), &message, MSG_CMSG_CLOEXEC);
        if (got < 0 && errno == ECONNRESET) fail_as_gone(address.socket);  // it ended with this client in its queue
        if (got < 0) fail("the process that shared this memory does not answer", errno);
        if (got == 0) throw HandoffFailed("the process that shared this memory has closed the connection");
        const std::size_t before = all.size();
        collect(message, all);
        if ((message.msg_flags & MSG_CTRUNC) != 0) {
            throw HandoffFailed("this process can't take " + std::to_string(answer.total) +
                                " more file descriptors; raise its limit (ulimit -n)");
        }
        if (got != static_cast<ssize_t>(sizeof answer) || answer.total == 0) {
            throw HandoffFailed(
                "the process that shared this memory has taken it back; keep it until it has been "
                "opened here");
        }
        if (answer.first != before || all.size() == before || all.size() > answer.total) {
            throw HandoffFailed("the process at '" + address.socket + "' speaks another version of the protocol");
        }
        if (all.size() == answer.total) return all;
    }
}

}  // namespace elastikv
